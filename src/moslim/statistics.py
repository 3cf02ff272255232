"""Statistics on tensors that several measures share: ranks, rank correlation, intervals over questions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 1000
"""Draws of a bootstrap interval."""
_WEIGHTS_AT_ONCE = 2**20


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last axis of ``[..., K]``; ties share their average rank, NaN has none (NaN)."""
    comparable = values.nan_to_num(nan=torch.inf)
    ordered = comparable.sort(dim=-1).values
    below = torch.searchsorted(ordered, comparable)
    up_to = torch.searchsorted(ordered, comparable, right=True)
    return ((below + up_to + 1) / 2).where(~values.isnan(), torch.nan).to(values.dtype)


def rank_correlation(given: Tensor, found: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, with average ranks for ties.

    Args:
        given: ``[K]`` or ``[..., K]``.
        found: ``[..., K]``; NaN points are left out on both sides.

    Returns:
        ``[...]``; 0 where one side is constant, NaN with fewer than two points.
    """
    present = ~found.isnan()
    count = present.sum(dim=-1, keepdim=True)
    middle = (count + 1) / 2
    x = average_ranks(given.to(found.dtype).where(present, torch.nan)).sub(middle).nan_to_num(0.0)
    y = average_ranks(found).sub(middle).nan_to_num(0.0)
    scale = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    rho = torch.where(scale > 0, (x * y).sum(dim=-1) / scale.clamp_min(1e-12), 0.0)
    return rho.where(count.squeeze(-1) >= 2, torch.nan)


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], questions: int, resamples: int = RESAMPLES, seed: int = 0
) -> Tensor:
    """95% interval of a statistic by drawing questions with replacement (Efron's percentile bootstrap).

    Questions are drawn, not rows: answers to one question are alike.

    Args:
        statistic: From ``[R, Q]`` float64, how often each of ``R`` resamples holds each question, to the statistic's
            value ``[R, ...]`` in each; NaN where it is not defined there.
        questions: ``Q``.
        resamples: Number of draws.
        seed: Seed of the draws: the same questions are drawn for whatever statistic, so intervals can be paired.

    Returns:
        ``[2, ...]``, lower and upper end; NaN with fewer than two questions, which say nothing of the spread.
    """
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // max(questions, 1))
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    values = torch.cat([statistic(_resampled(count, questions, generator)) for count in counts])
    ends = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return ends if questions >= 2 else torch.full_like(ends, torch.nan)


def _resampled(resamples: int, questions: int, generator: torch.Generator) -> Tensor:
    """``[R, Q]``: how often each question is drawn."""
    weights = torch.zeros(resamples, questions, dtype=torch.float64)
    if questions:
        drawn = torch.randint(questions, (resamples, questions), generator=generator)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return weights
