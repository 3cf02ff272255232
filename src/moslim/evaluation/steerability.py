"""Steerability: how closely achieved levels follow the requested ones.

Measures are pure functions on the tensors of all judged answers; NaN marks answers that could not be judged and is left
out. The result is one plain JSON document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moslim.evaluation.classifier_records import RESAMPLES, bootstrap_interval, rank_correlation
from moslim.evaluation.judges import JudgeInfo
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.utils.errors import UsageError
from moslim.utils.files import Result, plain

KINDS = ("sweep", "default", "seen", "unseen")
"""Shipped kinds of requests: one dimension's level sweep, no instruction, combinations of levels. Others may follow."""


@dataclass
class Records:
    """``N`` judged answers; ``D`` dimensions, at most ``K`` levels.

    Args:
        question: ``[N]`` int64, which question.
        sample: ``[N]`` int64, which of the answers drawn for one prompt.
        kinds: ``N`` names of :class:`~moslim.data.prompt_batches.EvaluationKind`.
        targets: ``[N, D]`` int64, requested level, -1 = not mentioned in the prompt.
        achieved: ``[N, D]`` float, the judge's level; NaN where it cannot judge.
        probs: ``[N, D, K]`` float, the training classifier's class probabilities, 0 on padded classes.

    Raises:
        UsageError: The fields disagree in ``N`` or ``D``, or a kind has no name.
    """

    question: Tensor
    sample: Tensor
    kinds: list[str]
    targets: Tensor
    achieved: Tensor
    probs: Tensor

    def __post_init__(self) -> None:
        n, d = self.targets.shape
        shapes = {
            "question": (self.question.shape, (n,)),
            "sample": (self.sample.shape, (n,)),
            "kinds": ((len(self.kinds),), (n,)),
            "achieved": (self.achieved.shape, (n, d)),
            "probs": (self.probs.shape[:2], (n, d)),
        }
        for name, (actual, expected) in shapes.items():
            if tuple(actual) != expected:
                raise UsageError(f"records.{name} is {tuple(actual)}, but targets {(n, d)} ask for {expected}")
        if not all(self.kinds):
            raise UsageError("records.kinds has an empty name: give the kind of request that each answer is to")

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def concat(cls, parts: Sequence[Records]) -> Records:
        """Joins the records of several batches or ranks.

        Raises:
            UsageError: There are no parts.
        """
        if not parts:
            raise UsageError("no records to join: the test data loader gave no batch")
        return cls(
            question=torch.cat([p.question for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            kinds=[kind for p in parts for kind in p.kinds],
            targets=torch.cat([p.targets for p in parts]),
            achieved=torch.cat([p.achieved for p in parts]),
            probs=torch.cat([p.probs for p in parts]),
        )

    def select(self, rows: Tensor) -> Records:
        """Keeps some rows: a mask ``[N]`` (bool) or positions (int64)."""
        rows = torch.arange(len(self))[rows.cpu()]
        return Records(
            question=self.question[rows],
            sample=self.sample[rows],
            kinds=[self.kinds[i] for i in rows.tolist()],
            targets=self.targets[rows],
            achieved=self.achieved[rows],
            probs=self.probs[rows],
        )

    def of_kind(self, kind: str) -> Records:
        """Keeps the rows of one kind."""
        return self.select(torch.tensor([k == kind for k in self.kinds], dtype=torch.bool))

    def canonical(self) -> Records:
        """Returns the same answers on CPU in one order, whatever batches and ranks they came from.

        Rows are ordered by question, kind, targets and sample. An answer that is there twice, as when ranks
        are padded to equal length, counts once.
        """
        known = [*KINDS, *sorted(set(self.kinds) - set(KINDS))]
        kinds = torch.tensor([known.index(kind) for kind in self.kinds], dtype=torch.long)
        columns = (self.question[:, None].cpu(), kinds[:, None], self.targets.cpu(), self.sample[:, None].cpu())
        identity = torch.cat(columns, dim=1)
        values = self.achieved.cpu().nan_to_num(-1.0)
        # lexsort's last key is the first to count: the identity's columns decide, values only break ties.
        keys = [*values.T.flip(0).numpy(), *identity.T.flip(0).numpy()]
        order = torch.from_numpy(np.lexsort(keys))
        identity = identity[order]
        new = torch.ones(len(self), dtype=torch.bool)
        new[1:] = (identity[1:] != identity[:-1]).any(dim=1)
        return self._cpu().select(order[new])

    def _cpu(self) -> Records:
        return Records(
            question=self.question.cpu(),
            sample=self.sample.cpu(),
            kinds=self.kinds,
            targets=self.targets.cpu(),
            achieved=self.achieved.cpu(),
            probs=self.probs.cpu(),
        )


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


SCHEMA = 1
"""Version of the document; a key that is added does not change it."""

MEASURES = ("exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range")


def steerability(
    policy: Records, base: Records, preferences: PreferenceSet, judge: JudgeInfo, config: dict[str, Any]
) -> Result:
    """Compares a policy with the one it started from.

    Args:
        policy: Judged answers of the trained policy.
        base: Judged answers of the starting policy to the same prompts.
        preferences: The dimensions, in the order of the records.
        judge: Who measured the achieved levels.
        config: Settings of the run to keep with the result: plain data without paths, times or versions.

    Returns:
        Plain data that :mod:`json` writes as it is: floats rounded to 6 digits, None for what could not be
        measured. It does not depend on the order of the records.

    Raises:
        UsageError: The records have another number of dimensions than ``preferences``.
    """
    for owner, records in (("policy", policy), ("base", base)):
        if records.targets.shape[1] != len(preferences):
            raise UsageError(
                f"the {owner}'s records have {records.targets.shape[1]} dimensions, preferences {len(preferences)}"
            )
    policy, base = policy.canonical(), base.canonical()
    after, before = sweeps(policy, preferences.sizes), sweeps(base, preferences.sizes)
    names = preferences.names
    talk = torch.stack([slopes(sweep.achieved).nanmean(dim=0) for sweep in after])
    gain = talk.diagonal()[:, None]
    relative = (talk / gain).where(gain.abs() > 1e-6, torch.nan)
    others = ~torch.eye(len(names), dtype=torch.bool)
    measured, measured_before = _control(after, names), _control(before, names)
    result = {
        "schema": SCHEMA,
        "judge": {"name": judge.name, "proxy": judge.proxy},
        **measured,
        "interval": {
            measure: mean_interval([control(sweep.own)[measure] for sweep in after])
            for measure in ("exact", "spearman")
        },
        "base": {**measured_before, "combinations": _combinations(base)},
        "combinations": _combinations(policy),
        "cross_talk": talk,
        "cross_talk_normalised": relative,
        "interference": relative[others].abs().nanmean(),
        "reward": _reward(measured_before, measured, {"before": before, "after": after}, names),
        "default_quality": {"before": _default(base, names), "after": _default(policy, names)},
        "curves": {
            name: {
                "requested": list(preferences[name].levels),
                "policy": a.own.nanmean(dim=(0, 1)),
                "base": b.own.nanmean(dim=(0, 1)),
                "shares": level_shares(a.own),
            }
            for name, a, b in zip(names, after, before, strict=True)
        },
        "n_questions": len(policy.question.unique()),
        "n_answers": len(policy),
    }
    return {**plain(result), "config": config}


def measures(records: Records, preferences: PreferenceSet) -> Result:
    """The level sweep alone: ``dimensions`` (name to measure to value) and their ``mean``, as plain data."""
    return plain(_control(sweeps(records.canonical(), preferences.sizes), preferences.names))


def _control(grids: list[SweepGrid], names: tuple[str, ...]) -> Result:
    dimensions = {
        name: {measure: value.nanmean() for measure, value in control(sweep.own).items()}
        for name, sweep in zip(names, grids, strict=True)
    }
    return {"dimensions": dimensions, "mean": {m: _mean([d[m] for d in dimensions.values()]) for m in MEASURES}}


def _combinations(records: Records) -> Result:
    further = sorted(set(records.kinds) - set(KINDS))
    return {kind: _joint(records.of_kind(kind)) for kind in ("seen", "unseen", *further)}


def _joint(records: Records) -> Result | None:
    """Share of answers with every requested level met, and the mean over dimensions of the MAE."""
    if not len(records):
        return None
    active = records.targets != INACTIVE
    error = (records.achieved.double() - records.targets).abs().where(active, torch.nan)
    judged = (active & ~error.isnan()).sum(dim=1) == active.sum(dim=1)
    met = ((error < 0.5) | ~active).all(dim=1)[judged]
    return {"joint_exact": met.double().mean(), "mae": error.nanmean(dim=0).nanmean(), "n_answers": len(records)}


def _reward(before: Result, after: Result, grids: dict[str, list[SweepGrid]], names: tuple[str, ...]) -> Result:
    """The trained reward (proxy: p_target) beside the goal (gold: exact), on the same answers."""
    gold = {"before": before["dimensions"], "after": after["dimensions"]}
    dimensions: Result = {
        name: {
            "proxy": {time: rows[i].p_target.nanmean() for time, rows in grids.items()},
            "gold": {time: gold[time][name]["exact"] for time in grids},
        }
        for i, name in enumerate(names)
    }
    means = {
        kind: {time: _mean([values[kind][time] for values in dimensions.values()]) for time in grids}
        for kind in ("proxy", "gold")
    }
    gap = {time: means["proxy"][time] - means["gold"][time] for time in grids}
    return {**means, "gap": gap, "dimensions": dimensions}


def _default(records: Records, names: tuple[str, ...]) -> Result:
    """Mean level of every dimension where nothing was asked for."""
    levels = records.of_kind("default").achieved.double().nanmean(dim=0)
    return dict(zip(names, levels, strict=True))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).nanmean()
