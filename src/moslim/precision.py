"""The precision of what is computed from a model's outputs: float32, or the model's own where that is finer."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The finer of a type and float32, in which losses, log-probabilities and rewards are held."""
    return torch.promote_types(dtype, torch.float32)


def widened(values: Tensor) -> Tensor:
    """Values in float32, or as they are where they are float64."""
    return values.to(at_least_float32(values.dtype))
