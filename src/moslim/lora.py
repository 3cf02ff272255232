"""Low-rank adapters (Hu et al., arXiv 2106.09685), through peft."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclass
class LoraOptions:
    """Options of an adapter.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Dropout before the update.
        target_modules: Last name parts of the layers to adapt, e.g. ``[q_proj, v_proj]``; None = what peft
            recommends for the architecture.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None


def add_lora(
    model: PreTrainedModel, options: LoraOptions, name: str = "default", trained_whole: Sequence[str] = ()
) -> PeftModel:
    """Freezes a model and puts an adapter on it.

    Args:
        model: The model; it is changed in place.
        options: Options of the adapter.
        name: The adapter's name.
        trained_whole: Names of modules that stay trainable as they are, such as a new head.

    Raises:
        ValueError: ``target_modules`` is not given and peft has no advice for the architecture.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, _peft_config(model, options), adapter_name=name)
    for part in trained_whole:
        # Not peft's `modules_to_save`: it would keep a frozen random copy of an untrained head beside it.
        model.get_submodule(part).requires_grad_(True)
    return adapted


def add_adapter(model: PeftModel, options: LoraOptions, name: str) -> list[nn.Parameter]:
    """Puts one more adapter on an adapted model and returns its weights; which one is active does not change."""
    before = {id(p) for p in model.parameters()}
    model.add_adapter(name, _peft_config(model.get_base_model(), options))
    return [p for p in model.parameters() if id(p) not in before]


def merged(model: Any) -> Any:
    """Returns a copy with its adapter merged into the weights, or the model itself where it has none."""
    return deepcopy(model).merge_and_unload() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter."""
    return hasattr(model, "peft_config")


def unwrapped(model: Any) -> Any:
    """Returns the model without peft's wrapper; the adapter's layers are still in it."""
    return model.get_base_model() if is_adapted(model) else model


def _peft_config(model: Any, options: LoraOptions) -> LoraConfig:
    from peft import LoraConfig

    targets = options.target_modules or _recommended(model.config)
    names = tuple(targets) if isinstance(targets, list) else ()
    transposed = any(isinstance(m, Conv1D) for n, m in model.named_modules() if n.endswith(names))
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
    )


def _recommended(config: Any) -> list[str] | str:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(config, "backbone", config).model_type
    if kind not in KNOWN:
        raise ValueError(f"no layers to adapt are known for '{kind}': give lora.target_modules, e.g. [q_proj, v_proj]")
    known = KNOWN[kind]
    return known if isinstance(known, str) else list(known)
