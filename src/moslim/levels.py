"""Level probabilities as numbers: where a distribution lies, and how far it is from a request."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.precision import widened
from moslim.preferences import INACTIVE


def expected_level(probs: Tensor) -> Tensor:
    """Mean of each level distribution, ``sum_k k p_k``: ``[..., K]`` to ``[...]``, in levels."""
    probs = widened(probs)  # a sum, no matrix product, which autocast would round
    return (probs * torch.arange(probs.shape[-1], device=probs.device)).sum(-1)


def expected_distance(probs: Tensor, targets: Tensor) -> Tensor:
    """Expected distance from the requested level, ``sum_k p_k |k - target|``.

    Args:
        probs: ``[B, D, K]``, 0 on levels that a dimension lacks.
        targets: ``[B, D]`` int64, requested level, -1 where none was.

    Returns:
        ``[B, D]``, in levels; NaN where none was requested.
    """
    probs = widened(probs)
    levels = torch.arange(probs.shape[-1], device=probs.device)
    distance = (levels - targets[..., None]).abs().to(probs.dtype)
    return (probs * distance).sum(-1).masked_fill(targets == INACTIVE, torch.nan)


def requested_probability(probs: Tensor, targets: Tensor) -> Tensor:
    """Probability of the requested level: ``[B, D, K]`` and ``[B, D]`` to ``[B, D]``, NaN where none was requested."""
    picked = widened(probs).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(targets == INACTIVE, torch.nan)
