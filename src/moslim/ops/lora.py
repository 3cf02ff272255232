"""Low-rank adapters (Hu et al., arXiv 2106.09685), through peft."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moslim.ops.loading import language_part
from moslim.ops.transformers_compat import lora_targets
from moslim.utils.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


PEFT_PREFIX = "base_model.model."
"""Prefix that peft gives to the names of the model under an adapter."""


ALL_LINEAR = "all-linear"
"""Stands for all linear layers of the part that reads texts, but for heads and the layer that predicts tokens."""

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d)
_NEVER_CALLED = ("dt_proj",)  # whose weight Mamba multiplies with by itself, always ...
_MAMBA = (*_NEVER_CALLED, "x_proj", "out_proj")  # ... and those that it reads so with fused kernels


@dataclass
class LoraOptions:
    """Options of an adapter.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Dropout before the update.
        target_modules: Last name parts of the layers to adapt, e.g. ``[q_proj, v_proj]``; ``all-linear`` for all linear
            layers but heads; or a pattern that whole names fit. None = what peft recommends for the architecture; all
            linear layers, where it knows none.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None


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
        UsageError: A name among ``target_modules`` fits no layer.
    """
    from peft import get_peft_model

    config = _peft_config(model, options, trained_whole)
    try:
        adapted = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        raise UsageError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
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
    if isinstance(options.target_modules, list | set):  # else layers of the same names elsewhere would have it, too
        ends = "|".join(map(re.escape, sorted(options.target_modules)))
        options.target_modules = rf"{re.escape(inside)}\.(.*\.)?({ends})"
    added = _add(model, options, name)
    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {f"{PEFT_PREFIX}{inside}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in weights.items()}
    if places.keys() != tensors.keys():
        raise UsageError(
            f"the adapter '{name}' lacks the weights {sorted(places.keys() - tensors.keys())} and has "
            f"{sorted(tensors.keys() - places.keys())}, which have no place: it is incomplete or its keys are renamed"
        )
    set_peft_model_state_dict(model, tensors, adapter_name=name)
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


def _add(model: PeftModel, config: LoraConfig, name: str) -> list[nn.Parameter]:
    before = {id(p) for p in model.parameters()}
    model.add_adapter(name, config)
    return [p for p in model.parameters() if id(p) not in before]


def _peft_config(model: Any, options: LoraOptions, apart: Sequence[str] = ()) -> LoraConfig:
    from peft import LoraConfig

    layers, targets = chosen_layers(model, options.target_modules, apart)
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )


def chosen_layers(
    model: Any, wanted: list[str] | str | None, apart: Sequence[str] = ()
) -> tuple[dict[str, nn.Module], list[str]]:
    """Finds the layers that an adapter changes.

    Args:
        model: The model; it may have adapters.
        wanted: Last parts of names, a pattern of whole names, :data:`ALL_LINEAR`, or None for peft's advice.
        apart: Names of modules that are left alone, such as new heads.

    Returns:
        The layers by name, and names for peft that fit these and no others.

    Raises:
        UsageError: A name or the pattern fits no layer, or it fits embeddings that the model also predicts with.
    """
    part, modules = language_part(getattr(model, "backbone", model)), _without_adapters(model)
    inside = {id(module) for module in _without_adapters(part).values()}
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    output = None if output is None else _base_layer(output)
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, _ADAPTABLE)
        and (id(module) in inside or module is output)
        and not any(f"{name}.".startswith(f"{head}.") for head in apart)
    }
    linear = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not _read_by_kernels(name, modules)
        and not type(module).__module__.startswith("transformers.models.")  # Llama 4's router, which returns two
    ]
    if wanted is None:
        advised = _advised(model)
        names = [name for name in linear if _fits(name, advised)] or linear
    elif wanted in (ALL_LINEAR, [ALL_LINEAR]):
        names = linear
    else:
        for target in wanted if isinstance(wanted, list) else [wanted]:
            if not any(_fits(name, [target] if isinstance(wanted, list) else target) for name in layers):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
                raise UsageError(
                    f"lora.target_modules: '{target}' fits no layer that an adapter can change: there are {known}; "
                    f"give some of these, e.g. [{known.partition(',')[0]}], or {ALL_LINEAR}"
                )
        names = [name for name in layers if _fits(name, wanted)]
        if unread := [name for name in names if _read_by_kernels(name, modules, _NEVER_CALLED)]:
            raise UsageError(
                f"lora.target_modules: an adapter on '{unread[0]}' would never be used, since Mamba multiplies with "
                "its weight by itself: leave it out"
            )
    _refuse_tied(model, layers, names)
    short = sorted({name.rpartition(".")[2] for name in names})
    exact = [name for name in modules if _fits(name, short)] == names
    prefix = f"{model.base_model_prefix}."
    return {name: layers[name] for name in names}, short if exact else [name.removeprefix(prefix) for name in names]


def _fits(name: str, wanted: Sequence[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in wanted)


def _advised(model: Any) -> list[str] | str:
    """Layers that peft recommends for an architecture, or that of its language model; none if it has no advice."""
    config = getattr(model.config, "backbone", model.config)
    for model_type in (config.model_type, config.get_text_config().model_type):
        if (targets := lora_targets(model_type)) is not None:
            return targets
    return []


def _without_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by name, those under an adapter instead of it."""
    names = ((name, module) for name, module in model.named_modules() if "lora_" not in name)
    return {name: _base_layer(module) for name, module in names if "base_layer" not in name.split(".")}


def _base_layer(module: nn.Module) -> nn.Module:
    layer: nn.Module = getattr(module, "base_layer", module)
    return layer


def _read_by_kernels(name: str, modules: Mapping[str, nn.Module], last: Collection[str] = _MAMBA) -> bool:
    """Whether a layer is one of those of Mamba whose weights are read without their adapter."""
    owner, _, last_part = name.rpartition(".")
    return last_part in last and isinstance(getattr(modules.get(owner), "conv1d", None), nn.Conv1d)


def _refuse_tied(model: Any, layers: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Raises where a layer's weight is another layer's, too: merging the adapter would change both."""
    for name in names:
        weight = layers[name].weight
        others = [other for other, module in layers.items() if module.weight is weight and other != name]
        if others:
            raise UsageError(
                f"lora.target_modules: '{name}' has the same weight as '{others[0]}', so that an adapter on it cannot "
                "be merged: leave it out"
            )
