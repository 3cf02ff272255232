"""Language models that carry a state from token to token: convolutions, state spaces, linear attention, recurrences."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moslim.ops.transformers_compat import is_stateful
from moslim.packing import token_positions
from moslim.processes import inform

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_MASKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def carries_state(model: Any) -> bool:
    """Whether some layers of a model do not attend but carry a state; it must be without an adapter's wrapper."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return is_stateful(model) or not _ATTENTION.issuperset(kinds)


@cache
def say_once(message: str) -> None:
    """Tells something that concerns every model of a kind, such as a policy and its reference."""
    inform(message)


def agreement(model: Any) -> float:
    """Greatest difference of two computations of the same logits that counts as rounding, relative to the largest."""
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 0.1


@torch.no_grad()
def masks_left_padding(model: Any) -> bool:
    """Whether padding before a text leaves what a causal language model computes of it as it is.

    Attention masks it; a state that runs through it need not. A model that carries a state is tried once.

    Args:
        model: Without an adapter, in the Hugging Face form.
    """
    if not carries_state(model):
        return True
    if model not in _MASKS:
        _MASKS[model] = _unmoved_by_padding(model)
        if not _MASKS[model]:
            say_once(f"{model.config.model_type}: padding before a text changes its states: none is put there.")
    return _MASKS[model]


def _unmoved_by_padding(model: Any) -> bool:
    ids = made_up_tokens(model, 2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.autocast(model.device.type, enabled=False):
        alone = model(input_ids=ids[1:, 3:], use_cache=False)[0][0, -1]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": token_positions(mask)}
        padded = model(**inputs, use_cache=False)[0][1, -1]
    return bool((padded - alone).abs().max() <= agreement(model) * alone.abs().max())


def made_up_tokens(model: Any, rows: int, length: int) -> torch.Tensor:
    """``[rows, length]`` different small ids, none of them 0, which is often padding and embedded as nothing."""
    most = len(model.get_input_embeddings().weight)
    return (torch.arange(rows * length, device=model.device) % max(1, most - 1) + 1).clamp(max=most - 1).view(rows, -1)
