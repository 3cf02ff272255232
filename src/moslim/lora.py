"""Low-rank adapters (Hu et al., arXiv 2106.09685), through peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moslim.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


PEFT_PREFIX = "base_model.model."
"""What peft puts before the names of the model under an adapter."""


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
        UsageError: ``target_modules`` is not given and peft has no advice for the architecture.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, _peft_config(model, options), adapter_name=name)
    for part in trained_whole:
        # Not peft's `modules_to_save`: it would keep a frozen random copy of an untrained head beside it.
        model.get_submodule(part).requires_grad_(True)
    return adapted


def add_adapter(model: PeftModel, options: LoraOptions, name: str) -> list[nn.Parameter]:
    """Puts one more adapter on an adapted model and returns its weights; which one is active does not change."""
    return _add(model, _peft_config(model.get_base_model(), options), name)


def attach_adapter(
    model: PeftModel, options: LoraConfig, weights: Mapping[str, Tensor], name: str, inside: str
) -> list[nn.Parameter]:
    """Puts a trained adapter, frozen and without dropout, beside a model's own; which one is active does not change.

    Args:
        model: The adapted model.
        options: Options of the trained adapter.
        weights: Its weights, by peft's names for an adapter of the part of the model that it was trained on.
        name: What it is called here.
        inside: Name of that part in the model, such as ``model``.

    Returns:
        Its weights in the model.

    Raises:
        UsageError: The layers that it changes are not those that it has weights for.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    options = deepcopy(options)
    options.lora_dropout, options.inference_mode = 0.0, True
    added = _add(model, options, name)
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    found = {f"{PEFT_PREFIX}{inside}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in weights.items()}
    if wanted.keys() != found.keys():
        raise UsageError(
            f"the adapter '{name}' lacks the weights {sorted(wanted.keys() - found.keys())} and has "
            f"{sorted(found.keys() - wanted.keys())}, which have no place: it is incomplete or its keys are renamed"
        )
    set_peft_model_state_dict(model, found, adapter_name=name)
    for parameter in added:
        parameter.requires_grad_(False)
    return added


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model less those of its adapters, by the names that they have without any adapter."""
    named = model.named_parameters()
    return {name.replace(".base_layer.", "."): p.detach() for name, p in named if "lora_" not in name}


def merged(model: Any) -> Any:
    """Returns a copy with its adapter merged into the weights, or the model itself where it has none."""
    return deepcopy(model).merge_and_unload() if is_adapted(model) else model


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter."""
    return hasattr(model, "peft_config")


def adapter_scales(model: Any) -> dict[str, dict[str, Any]]:
    """By adapter: rank, alpha and the layers that it changes, which give its weights their meaning."""
    return {
        name: {"rank": options.r, "alpha": float(options.lora_alpha), "target_modules": _targets(options)}
        for name, options in getattr(model, "peft_config", {}).items()
    }


def _targets(options: LoraConfig) -> list[str] | str | None:
    targets = options.target_modules
    return targets if targets is None or isinstance(targets, str) else sorted(targets)


def unwrapped(model: Any) -> Any:
    """Returns the model without peft's wrapper; the adapter's layers are still in it."""
    return model.get_base_model() if is_adapted(model) else model


def _add(model: PeftModel, config: LoraConfig, name: str) -> list[nn.Parameter]:
    before = {id(p) for p in model.parameters()}
    model.add_adapter(name, config)
    return [p for p in model.parameters() if id(p) not in before]


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
        raise UsageError(f"no layers to adapt are known for '{kind}': give lora.target_modules, e.g. [q_proj, v_proj]")
    known = KNOWN[kind]
    return known if isinstance(known, str) else list(known)
