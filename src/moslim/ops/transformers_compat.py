"""Every use of a private or undocumented interface of transformers, peft and torch.

A release of these libraries may change them without notice. Each function names the interface and the version that it
was checked with; ``tests/ops/test_transformers_compat.py`` names the interface that has changed. Those of
Lightning, jsonargparse and W&B are in :mod:`moslim.training.lightning_compat`.

Some names are undocumented, too, but used as they are: the tables of class names by ``model_type`` in
``transformers.models.auto.modeling_auto`` and the attention function ``sdpa_attention_forward`` (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a model uses, such as ``sdpa``.

    Reads ``PreTrainedConfig._attn_implementation`` (transformers 5.23).
    """
    return config._attn_implementation


@contextmanager
def attention_replaced(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Lets a model use another registered attention.

    Sets ``PreTrainedConfig._attn_implementation`` (transformers 5.23), which a model reads in every forward pass; its
    ``set_attn_implementation`` would check and load kernels each time.

    Args:
        config: Configuration of the part that reads text.
        name: Name in ``AttentionInterface``.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def is_stateful(model: nn.Module) -> bool:
    """Whether a model says that it carries a state from token to token.

    Reads ``PreTrainedModel._is_stateful`` (transformers 5.23).
    """
    return bool(getattr(model, "_is_stateful", False))


def block_kinds(model: nn.Module) -> frozenset[str] | None:
    """Class names of a transformer's blocks; empty if it does not name them, None for another kind of module.

    Reads ``PreTrainedModel._no_split_modules`` (transformers 5.23).
    """
    if not hasattr(model, "_no_split_modules"):
        return None
    return frozenset(model._no_split_modules or ())  # type: ignore[arg-type]


def found_file(folder: str, name: str) -> str | None:
    """Path of a file in a folder or a repository of the Hub; None where there is none.

    Passes ``_raise_exceptions_for_missing_entries`` to ``cached_file`` (transformers 5.23).
    """
    path: str | None = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return path


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a configuration, without those that depend on where and how it was saved.

    Leaves out ``_name_or_path`` (transformers 5.23), among others.
    """
    return {name: value for name, value in config.to_dict().items() if name not in _ABOUT_FILES}


def apply_liger(model: nn.Module) -> None:
    """Puts Liger's fused kernels into a model, without those of the loss.

    Calls ``transformers.integrations.liger.apply_liger_kernel`` (transformers 5.23), which ``Trainer`` uses.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def lora_targets(model_type: str) -> list[str] | str | None:
    """Layers that peft adapts by default in an architecture; None where it knows none.

    Reads ``peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`` (peft 0.21).
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known: Any = KNOWN.get(model_type)
    return known if known is None or isinstance(known, str) else [str(name) for name in known]


def matching_pattern(patterns: Any, name: str) -> str:
    """The first of peft's patterns (of ``rank_pattern``, say) that a module's name fits; the name where none fits.

    Calls ``peft.utils.other.get_pattern_key`` (peft 0.21).
    """
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(patterns, name))


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward pass.

    Reads ``Module._forward_hooks`` and ``Module._forward_pre_hooks`` (torch 2.13).
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_pack_linear() -> bool:
    """Whether torch has oneDNN's packed product, which :func:`packed_linear` makes.

    Asks for ``torch.ops.mkldnn._linear_pointwise`` and ``_reorder_linear_weight`` (torch 2.13).
    """
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def packed_linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A product with a copy of a float32 matrix in oneDNN's packed order, as Inductor's frozen models make it.

    Calls ``torch.ops.mkldnn._reorder_linear_weight`` and ``_linear_pointwise`` (torch 2.13).

    Args:
        weight: ``[V, H]``, on a CPU.
        rows: Number of rows to pack for; others work, too.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")
        return product

    return forward
