"""Several rewards per answer, one per dimension, made into one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moslim.errors import UsageError

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
_LEAST = 1e-4


def normalize_then_sum(per_dimension: Tensor, std_floor: float, weights: Tensor | None = None) -> Tensor:
    """Normalises every dimension within its group, then adds up (GDPO, arXiv 2601.05242, with a softened std).

    ``sum_d w_d (r_d - mean_G r_d) / sqrt(var_G r_d + std_floor^2) / sqrt(sum_d w_d^2)`` over the dimensions that are
    active for the answer; mean and variance (uncorrected) are those of the group's answers that have a value. The floor
    keeps a dimension that is already satisfied from being noise blown up to unit variance; without one, a deviation
    below 1e-4 is taken for rounding. The root keeps prompts that name many dimensions from counting more. GDPO's last
    step, dividing by the standard deviation of the whole batch, is GRPO's ``scale: batch`` and the whitening of
    REINFORCE++ and PPO.

    Args:
        per_dimension: ``[G, n, D]``, NaN where inactive.
        std_floor: In units of the reward.
        weights: ``[G, n, D]``, 0 or more; None = equal ones.

    Returns:
        ``[G, n]``; 0 where no dimension is active.

    Raises:
        UsageError: There is one answer per prompt, which is no group to normalise in.
    """
    if per_dimension.shape[1] < 2:
        raise UsageError(
            "aggregation normalize_then_sum compares the answers to a prompt: set samples_per_prompt to 2 or more, "
            "or aggregation to sum_then_normalize"
        )
    active = (~per_dimension.isnan()).to(per_dimension.dtype)
    values = per_dimension.masked_fill(per_dimension.isnan(), 0.0)
    count = active.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(dim=1, keepdim=True) / count) * active
    scale = (centred.square().sum(dim=1, keepdim=True) / count + std_floor**2).sqrt().clamp(min=_LEAST)
    weight = active if weights is None else active * weights
    total = (centred / scale * weight).sum(dim=-1)
    return total / weight.square().sum(dim=-1).sqrt().clamp(min=1e-8)
