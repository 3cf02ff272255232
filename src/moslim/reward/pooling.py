"""What the heads read of a text: one vector, made of the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moslim.precision import at_least_float32, widened

Pooling = Literal["last", "mean", "first", "max"]


def pool(hidden: Tensor, mask: Tensor, kinds: Sequence[Pooling]) -> Tensor:
    """Pools the hidden states of texts, wherever their padding is.

    Args:
        hidden: ``[B, T, H]``.
        mask: ``[B, T]``, 0 on padding; each row has a token.
        kinds: ``last`` or ``first`` (the state of that token), ``mean`` or ``max`` (over all tokens).

    Returns:
        ``[B, P * H]`` float32 or finer, for ``P`` kinds, side by side in their order.
    """
    parts = [widened(_pooled(hidden, mask, kind)) for kind in kinds]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _pooled(hidden: Tensor, mask: Tensor, kind: Pooling) -> Tensor:
    if kind == "first":
        return hidden[torch.arange(len(mask), device=mask.device), mask.argmax(1)]
    if kind == "last":
        position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        end = (mask * position).argmax(1)
        return hidden[torch.arange(len(end), device=end.device), end]
    if kind == "max":
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    total = (hidden * mask[..., None].to(hidden.dtype)).sum(1, dtype=at_least_float32(hidden.dtype))
    return total / mask.sum(1, keepdim=True).clamp(min=1)
