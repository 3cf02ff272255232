"""Measures of control as pure functions on tensors. NaN stands for what could not be judged, and is left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.evaluation.records import Records
from moslim.preferences import INACTIVE
from moslim.statistics import RESAMPLES, bootstrap_interval, rank_correlation


@dataclass
class SweepGrid:
    """Answers to the same ``Q`` questions with one dimension's ``K`` levels requested in turn, ``S`` samples each.

    Args:
        dimension: Position of the dimension that is moved.
        achieved: ``[Q, S, K, D]`` float64, level on every dimension; NaN where missing or not judged.
        p_target: ``[Q, S, K]`` float64, the training classifier's probability of the requested level; NaN where
            the judge gave none, so that both are averages over the same answers.
    """

    dimension: int
    achieved: Tensor
    p_target: Tensor

    @property
    def own(self) -> Tensor:
        """``[Q, S, K]`` achieved level on the dimension that is moved."""
        return self.achieved[..., self.dimension]


def sweeps(records: Records, sizes: tuple[int, ...]) -> list[SweepGrid]:
    """Sorts the answers of kind ``sweep`` into one grid per dimension, all over the same questions.

    Args:
        records: Judged answers, each there once (:meth:`Records.canonical`).
        sizes: Number of levels of each dimension.

    Raises:
        UsageError: A sweep prompt mentions no dimension or several.
    """
    records = records.of_kind("sweep")
    moved = records.targets != INACTIVE
    if not bool((moved.sum(dim=1) == 1).all()):
        raise UsageError("a prompt of kind 'sweep' must ask for exactly one dimension; use 'seen' or 'unseen'")
    questions, question = records.question.unique(return_inverse=True)
    samples, sample = records.sample.unique(return_inverse=True)
    grids = []
    for i, size in enumerate(sizes):
        rows = moved[:, i]
        level = records.targets[rows, i]
        cell = (question[rows], sample[rows], level)
        shape = (len(questions), len(samples), size)
        achieved = torch.full((*shape, len(sizes)), torch.nan, dtype=torch.float64)
        achieved[cell] = records.achieved[rows].double()
        p_target = torch.full(shape, torch.nan, dtype=torch.float64)
        p_target[cell] = records.probs[rows, i].double().gather(1, level[:, None]).squeeze(1)
        grids.append(SweepGrid(i, achieved, p_target.where(~achieved[..., i].isnan(), torch.nan)))
    return grids


def control(achieved: Tensor) -> dict[str, Tensor]:
    """The six measures of one dimension's sweep, question by question.

    A level between two integers counts as the nearer one in ``exact`` and ``within_one``.

    Args:
        achieved: ``[Q, S, K]`` achieved level; the last axis is the requested level.

    Returns:
        Measure to values ``[Q, M]``, NaN where not defined: a measure's value is the mean of what is not NaN.
        ``spearman`` has one value per sample, ``monotonicity`` one per pair of neighbouring levels,
        ``dynamic_range`` one per sample: achieved at the highest request minus at the lowest.
    """
    requested = torch.arange(achieved.shape[-1], dtype=achieved.dtype)
    error = (achieved - requested).abs()
    step = achieved.diff(dim=-1)
    values = {
        "exact": _share(error < 0.5, error),
        "within_one": _share(error < 1.5, error),
        "mae": error,
        "spearman": rank_correlation(requested, achieved),
        "monotonicity": _share(step >= 0, step),
        "dynamic_range": achieved[..., -1] - achieved[..., 0],
    }
    return {name: value.flatten(start_dim=1) for name, value in values.items()}


def slopes(achieved: Tensor) -> Tensor:
    """Change of every dimension's level per level of the request, least squares per question.

    Args:
        achieved: ``[Q, S, K, D]``, third axis = requested level of the dimension that is moved.

    Returns:
        ``[Q, D]``; NaN where fewer than two different requests were judged.
    """
    judged = ~achieved.isnan()
    requested = torch.arange(achieved.shape[2], dtype=achieved.dtype)[:, None].expand_as(achieved)
    count = judged.sum(dim=(1, 2), keepdim=True)
    centred = (requested - (requested * judged).sum(dim=(1, 2), keepdim=True) / count) * judged
    spread = centred.square().sum(dim=(1, 2))
    slope = (centred * achieved.nan_to_num(0.0)).nansum(dim=(1, 2)) / spread
    return slope.where(spread > 0, torch.nan)


def level_shares(achieved: Tensor) -> Tensor:
    """Share of answers at each achieved level, per requested level.

    Args:
        achieved: ``[Q, S, K]``.

    Returns:
        ``[K, K]``, rows = requested, summing to 1; NaN rows where nothing was judged.
    """
    size = achieved.shape[-1]
    nearest = achieved.round().clamp(0, size - 1)
    counts = (nearest[..., None] == torch.arange(size)).sum(dim=(0, 1)).double()
    return counts / counts.sum(dim=1, keepdim=True)


def mean_interval(values: list[Tensor], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% interval of a measure's mean over dimensions; every dimension sees the same draw of questions.

    Args:
        values: One ``[Q, M]`` tensor per dimension, as :func:`control` gives.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper end; NaN with fewer than two questions.
    """
    total = torch.stack([v.nansum(dim=1) for v in values], dim=1)
    count = torch.stack([(~v.isnan()).sum(dim=1).double() for v in values], dim=1)

    def mean(weights: Tensor) -> Tensor:
        return ((weights @ total) / (weights @ count)).nanmean(dim=1)

    low, high = bootstrap_interval(mean, len(total), resamples, seed).tolist()
    return low, high


def _share(holds: Tensor, judged: Tensor) -> Tensor:
    """0 or 1 where a condition could be checked, NaN elsewhere."""
    return holds.to(judged.dtype).where(~judged.isnan(), torch.nan)
