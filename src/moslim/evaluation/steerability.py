"""Steerability: measures of the agreement between requested and achieved levels.

Measures are pure functions on tensors of judged completions. NaN stands for levels that could not be judged, and is
left out of means. The result is one JSON document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moslim.evaluation.classifier_records import RESAMPLES, bootstrap_interval, rank_correlation
from moslim.evaluation.joint_control import JointRequests, joint_control
from moslim.evaluation.judges import JudgeInfo
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.utils.errors import UsageError
from moslim.utils.files import Result, plain

KINDS = ("sweep", "default", "seen", "unseen")
"""Shipped kinds of prompts: level sweep of one dimension, no instruction, and two sets of combinations."""


@dataclass
class Records:
    """``N`` judged completions; ``D`` dimensions, at most ``K`` levels.

    Args:
        question: ``[N]`` int64, index of the question.
        sample: ``[N]`` int64, index of the completion among those of one prompt.
        kinds: ``N`` names of :class:`~moslim.data.prompt_batches.EvaluationKind`.
        targets: ``[N, D]`` int64, requested level, -1 = not requested.
        achieved: ``[N, D]`` float, level by the judge; NaN where it cannot judge.
        probs: ``[N, D, K]`` float, level probabilities of the training classifier, 0 on levels that a dimension lacks.

    Raises:
        UsageError: The fields differ in ``N`` or ``D``, or the name of a kind is empty.
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
                raise UsageError(f"records.{name} has shape {tuple(actual)}, but targets of {(n, d)} need {expected}")
        if not all(self.kinds):
            raise UsageError("records.kinds has an empty name: name the kind of prompt of each completion")

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def concat(cls, parts: Sequence[Records]) -> Records:
        """Concatenates the records of several batches or processes.

        Raises:
            UsageError: There are no parts.
        """
        if not parts:
            raise UsageError("no completions were judged: the test data loader has no batch; check the test split")
        return cls(
            question=torch.cat([part.question for part in parts]),
            sample=torch.cat([part.sample for part in parts]),
            kinds=[kind for part in parts for kind in part.kinds],
            targets=torch.cat([part.targets for part in parts]),
            achieved=torch.cat([part.achieved for part in parts]),
            probs=torch.cat([part.probs for part in parts]),
        )

    def select(self, rows: Tensor) -> Records:
        """Selects rows by a mask ``[N]`` (bool) or by indices (int64)."""
        indices = torch.arange(len(self))[rows.cpu()]
        return Records(
            question=self.question[indices],
            sample=self.sample[indices],
            kinds=[self.kinds[i] for i in indices.tolist()],
            targets=self.targets[indices],
            achieved=self.achieved[indices],
            probs=self.probs[indices],
        )

    def of_kind(self, kind: str) -> Records:
        """Selects the rows of one kind."""
        return self.select(torch.tensor([name == kind for name in self.kinds], dtype=torch.bool))

    def canonical(self) -> Records:
        """Returns the records on CPU in an order that does not depend on batches and processes.

        Rows are sorted by question, kind, targets and sample. Duplicates are removed; they arise when processes are
        padded to equal length.
        """
        ordered_kinds = [*KINDS, *sorted(set(self.kinds) - set(KINDS))]
        kinds = torch.tensor([ordered_kinds.index(kind) for kind in self.kinds], dtype=torch.long)
        columns = (self.question[:, None].cpu(), kinds[:, None], self.targets.cpu(), self.sample[:, None].cpu())
        identity = torch.cat(columns, dim=1)
        values = self.achieved.cpu().nan_to_num(-1.0)
        # The last key of lexsort is the primary one: the columns of the identity decide, the values only break ties.
        keys = [*values.T.flip(0).numpy(), *identity.T.flip(0).numpy()]
        order = torch.from_numpy(np.lexsort(keys))
        identity = identity[order]
        is_first = torch.ones(len(self), dtype=torch.bool)
        is_first[1:] = (identity[1:] != identity[:-1]).any(dim=1)
        return self._cpu().select(order[is_first])

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
    """Completions of ``Q`` questions with each of the ``K`` levels of one dimension requested, ``S`` samples each.

    Args:
        dimension: Index of the swept dimension.
        achieved: ``[Q, S, K, D]`` float64, level on every dimension; NaN where missing or not judged.
        p_target: ``[Q, S, K]`` float64, the training classifier's probability of the requested level; NaN where the
            swept dimension was not judged, so that proxy and gold are means over the same completions.
    """

    dimension: int
    achieved: Tensor
    p_target: Tensor

    @property
    def swept(self) -> Tensor:
        """Achieved level on the swept dimension, ``[Q, S, K]``."""
        return self.achieved[..., self.dimension]


def sweeps(records: Records, sizes: tuple[int, ...]) -> list[SweepGrid]:
    """Arranges the completions of kind ``sweep`` in one grid per dimension, all over the same questions.

    Args:
        records: Judged completions without duplicates (:meth:`Records.canonical`).
        sizes: Number of levels of each dimension.

    Raises:
        UsageError: A prompt of the sweep requests no dimension or several.
    """
    records = records.of_kind("sweep")
    requested = records.targets != INACTIVE
    if not bool((requested.sum(dim=1) == 1).all()):
        raise UsageError("a prompt of kind 'sweep' must ask for exactly one dimension; use 'seen' or 'unseen'")
    questions, question_indices = records.question.unique(return_inverse=True)
    samples, sample_indices = records.sample.unique(return_inverse=True)
    grids = []
    for d, size in enumerate(sizes):
        mask = requested[:, d]
        levels = records.targets[mask, d]
        cells = (question_indices[mask], sample_indices[mask], levels)
        shape = (len(questions), len(samples), size)
        achieved = torch.full((*shape, len(sizes)), torch.nan, dtype=torch.float64)
        achieved[cells] = records.achieved[mask].double()
        p_target = torch.full(shape, torch.nan, dtype=torch.float64)
        p_target[cells] = records.probs[mask, d].double().gather(1, levels[:, None]).squeeze(1)
        grids.append(SweepGrid(d, achieved, p_target.where(~achieved[..., d].isnan(), torch.nan)))
    return grids


def sweep_measures(achieved: Tensor) -> dict[str, Tensor]:
    """Computes the six measures of a sweep, per question.

    ``exact`` and ``within_one`` round a level between two integers to the nearer one.

    Args:
        achieved: ``[Q, S, K]`` achieved level; the last axis is the requested level.

    Returns:
        Values ``[Q, M]`` by measure, whose mean without NaN is the result. ``spearman`` has one value per sample,
        ``monotonicity`` one per pair of neighbouring levels (1 if the achieved level does not fall), ``dynamic_range``
        one per sample (achieved level at the highest request minus that at the lowest).
    """
    requested = torch.arange(achieved.shape[-1], dtype=achieved.dtype)
    error = (achieved - requested).abs()
    step = achieved.diff(dim=-1)
    values = {
        "exact": _indicator(error < 0.5, error),
        "within_one": _indicator(error < 1.5, error),
        "mae": error,
        "spearman": rank_correlation(requested, achieved),
        "monotonicity": _indicator(step >= 0, step),
        "dynamic_range": achieved[..., -1] - achieved[..., 0],
    }
    return {name: value.flatten(start_dim=1) for name, value in values.items()}


def slopes(achieved: Tensor) -> Tensor:
    """Least-squares slope of every dimension's achieved level over the requested level, per question.

    Args:
        achieved: ``[Q, S, K, D]``; the third axis is the requested level of the swept dimension.

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
    """Distribution of the achieved level, per requested level.

    Args:
        achieved: ``[Q, S, K]``; the last axis is the requested level.

    Returns:
        ``[K, K]``, a row per requested level, which sums to 1; NaN where no completion was judged.
    """
    size = achieved.shape[-1]
    nearest = achieved.round().clamp(0, size - 1)
    counts = (nearest[..., None] == torch.arange(size)).sum(dim=(0, 1)).double()
    return counts / counts.sum(dim=1, keepdim=True)


def mean_interval(values: list[Tensor], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a measure's mean over dimensions, by resampling questions jointly for all dimensions.

    Args:
        values: ``[Q, M]`` of each dimension, from :func:`sweep_measures`.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        Lower and upper bound; NaN with fewer than two questions.
    """
    sums = torch.stack([value.nansum(dim=1) for value in values], dim=1)
    counts = torch.stack([(~value.isnan()).sum(dim=1).double() for value in values], dim=1)

    def mean(question_counts: Tensor) -> Tensor:
        return ((question_counts @ sums) / (question_counts @ counts)).nanmean(dim=1)

    low, high = bootstrap_interval(mean, len(sums), resamples, seed).tolist()
    return low, high


def _indicator(condition: Tensor, values: Tensor) -> Tensor:
    """1 where a condition on values holds, 0 where it does not, NaN where the value is NaN."""
    return condition.to(values.dtype).where(~values.isnan(), torch.nan)


SCHEMA = 1
"""Version of the document, which additional keys do not change."""

MEASURES = ("exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range")
"""Keys of :func:`sweep_measures`."""


def steerability(
    policy: Records, base: Records, preferences: PreferenceSet, judge: JudgeInfo, config: dict[str, Any]
) -> Result:
    """Computes the steerability of a trained policy and of the policy that it started from.

    Args:
        policy: Judged completions of the trained policy.
        base: Judged completions of the starting policy for the same prompts.
        preferences: The dimensions, in the order of the records.
        judge: Judge that measured the achieved levels.
        config: Settings of the run to keep with the result: plain data without paths, times or versions.

    Returns:
        The JSON document as plain data: floats rounded to 6 digits, None for undefined values. It does not depend on
        the order of the records.

    Raises:
        UsageError: The records and ``preferences`` differ in the number of dimensions.
    """
    for name, records in (("policy", policy), ("base", base)):
        if records.targets.shape[1] != len(preferences):
            raise UsageError(
                f"the records of '{name}' have {records.targets.shape[1]} dimensions, but `preferences` has "
                f"{len(preferences)}: judge the completions with the same preferences"
            )
    policy, base = policy.canonical(), base.canonical()
    grids = {"before": sweeps(base, preferences.sizes), "after": sweeps(policy, preferences.sizes)}
    names = preferences.names
    before, after = (_measures(sweep_grids, names) for sweep_grids in grids.values())
    cross_talk = torch.stack([slopes(grid.achieved).nanmean(dim=0) for grid in grids["after"]])
    swept_slope = cross_talk.diagonal()[:, None]
    relative = (cross_talk / swept_slope).where(swept_slope.abs() > 1e-6, torch.nan)
    off_diagonal = ~torch.eye(len(names), dtype=torch.bool)
    result = {
        "schema": SCHEMA,
        "judge": {"name": judge.name, "proxy": judge.proxy},
        **after,
        "interval": {
            measure: mean_interval([sweep_measures(grid.swept)[measure] for grid in grids["after"]])
            for measure in ("exact", "spearman")
        },
        "base": {**before, "combinations": _combinations(base)},
        "combinations": _combinations(policy),
        "joint": {
            kind: joint_control(policy.of_kind(kind), grids["after"], preferences) for kind in _joint_kinds(policy)
        },
        "cross_talk": cross_talk,
        "cross_talk_normalised": relative,
        "interference": relative[off_diagonal].abs().nanmean(),
        "reward": _reward(before, after, grids, names),
        "default_quality": {"before": _default_levels(base, names), "after": _default_levels(policy, names)},
        "curves": {
            name: {
                "requested": list(preferences[name].levels),
                "policy": grid.swept.nanmean(dim=(0, 1)),
                "base": base_grid.swept.nanmean(dim=(0, 1)),
                "shares": level_shares(grid.swept),
            }
            for name, grid, base_grid in zip(names, grids["after"], grids["before"], strict=True)
        },
        "n_questions": len(policy.question.unique()),
        "n_answers": len(policy),
    }
    return {**plain(result), "config": config}


def measures(records: Records, preferences: PreferenceSet) -> Result:
    """Computes the measures of the level sweep: ``dimensions``, by name and measure, and their ``mean``."""
    return plain(_measures(sweeps(records.canonical(), preferences.sizes), preferences.names))


def _measures(grids: list[SweepGrid], names: tuple[str, ...]) -> Result:
    dimensions = {
        name: {measure: value.nanmean() for measure, value in sweep_measures(grid.swept).items()}
        for name, grid in zip(names, grids, strict=True)
    }
    mean = {measure: _mean([values[measure] for values in dimensions.values()]) for measure in MEASURES}
    return {"dimensions": dimensions, "mean": mean}


def _combinations(records: Records) -> Result:
    return {kind: _joint_measures(records.of_kind(kind)) for kind in _joint_kinds(records)}


def _joint_kinds(records: Records) -> list[str]:
    """Kinds of requests that name several dimensions."""
    return ["seen", "unseen", *sorted(set(records.kinds) - set(KINDS))]


def _joint_measures(records: Records) -> Result | None:
    """Share of completions that meet all requested levels, and the mean absolute error averaged over dimensions."""
    if not len(records):
        return None
    error = (records.achieved.double() - records.targets).abs().where(records.targets != INACTIVE, torch.nan)
    all_met = JointRequests.of(records).all_met
    return {"joint_exact": all_met.double().mean(), "mae": error.nanmean(dim=0).nanmean(), "n_answers": len(records)}


def _reward(before: Result, after: Result, grids: dict[str, list[SweepGrid]], names: tuple[str, ...]) -> Result:
    """Proxy (``p_target``) and gold (``exact``) before and after training, over the same completions."""
    gold = {"before": before["dimensions"], "after": after["dimensions"]}
    dimensions: Result = {
        name: {
            "proxy": {phase: sweep_grids[d].p_target.nanmean() for phase, sweep_grids in grids.items()},
            "gold": {phase: gold[phase][name]["exact"] for phase in grids},
        }
        for d, name in enumerate(names)
    }
    means = {
        key: {phase: _mean([values[key][phase] for values in dimensions.values()]) for phase in grids}
        for key in ("proxy", "gold")
    }
    gap = {phase: means["proxy"][phase] - means["gold"][phase] for phase in grids}
    return {**means, "gap": gap, "dimensions": dimensions}


def _default_levels(records: Records, names: tuple[str, ...]) -> Result:
    """Mean achieved level of every dimension over prompts without an instruction."""
    levels = records.of_kind("default").achieved.double().nanmean(dim=0)
    return dict(zip(names, levels, strict=True))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).nanmean()
