"""Records of a classifier's validation and test: level probabilities, labels and score margins, and metrics over them.

Includes the statistics that several measures share: ranks, rank correlation and bootstrap intervals over questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from moslim.data.batches import known_levels
from moslim.data.sources.combined import question_key
from moslim.data.types import PairBatch, Question
from moslim.preferences import PreferenceSet, expected_level
from moslim.reward.losses import MISSING
from moslim.training.distributed import gathered

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


class HeldOut(Metric):
    """Collects what :func:`moslim.reward.heads.calibrate` needs, from rows that have a label."""

    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]
    questions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "targets", "questions"):
            self.add_state(name, [], "cat")

    def update(self, logits: Tensor, targets: Tensor, questions: Sequence[Question]) -> None:
        """Takes a batch: logits at temperature 1 and targets, both ``[B, D, K]``, and the ``B`` questions."""
        labelled = (targets > 0).any(-1).any(-1)
        keys = torch.tensor([question_number(question) for question in questions], device=logits.device)
        self.logits.append(logits[labelled])
        self.targets.append(targets[labelled])
        self.questions.append(keys[labelled])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and targets ``[N, D, K]``, and a hash ``[N]`` of each question. Every process must call it."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.targets), dim_zero_cat(self.questions)


def question_number(question: Question) -> int:
    """A number that stands for what :func:`question_key` calls one question: 64 bits, the same in every process."""
    digest = hashlib.sha256(question_key(question).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


MEASURES = ("accuracy", "within_one", "mae", "kappa")


class LevelMetrics(Metric):
    """Accuracy, within-one accuracy, mean absolute error and quadratic weighted kappa of every head.

    All four are read off one confusion matrix per head, so an update costs one product and nothing is computed
    before the epoch ends.

    Args:
        preferences: The dimensions.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, preferences: PreferenceSet) -> None:
        super().__init__()
        self.preferences = preferences
        width = max(preferences.sizes)
        self.add_state("confusion", torch.zeros(len(preferences), width, width, dtype=torch.long), "sum")

    def update(self, predicted: Tensor, levels: Tensor) -> None:
        """Counts a batch: predicted and labelled levels, both ``[B, D]``; rows labelled -1 do not count."""
        width = self.confusion.shape[-1]
        labelled = (levels != MISSING)[..., None]
        truth = F.one_hot(levels.clamp(min=0), width) * labelled
        self.confusion += (truth[..., None] * F.one_hot(predicted, width)[..., None, :]).sum(0)  # exact: whole numbers

    def compute(self) -> dict[str, Tensor]:
        """``dimension/measure`` and ``mean/measure`` (over heads) to value; what is undefined is left out.

        A head without labels has no value; kappa has none either where chance agreement is complete.
        """
        rows = {name: measures(matrix) for name, matrix in zip(self.preferences.names, self.confusion, strict=True)}
        found = {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        found |= {f"mean/{key}": torch.stack([row[key] for row in rows.values()]).nanmean() for key in MEASURES}
        return {key: value.float() for key, value in found.items() if not value.isnan()}


def measures(confusion: Tensor) -> dict[str, Tensor]:
    """The four measures of one head, ``[...]`` float64; NaN where undefined.

    Args:
        confusion: ``[..., K, K]`` counts, rows = labelled level, columns = predicted.
    """
    confusion = confusion.cpu().double()
    total = confusion.sum((-2, -1))
    level = torch.arange(confusion.shape[-1])
    distance = (level[:, None] - level).abs()
    squared = distance.square()
    by_chance = confusion.sum(-1, keepdim=True) @ confusion.sum(-2, keepdim=True) / total[..., None, None]
    return {
        "accuracy": confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / total,
        "within_one": (confusion * (distance <= 1)).sum((-2, -1)) / total,
        "mae": (confusion * distance).sum((-2, -1)) / total,
        # Cohen 1968; 0/0, where labels and predictions are one single level, is NaN
        "kappa": 1 - (confusion * squared).sum((-2, -1)) / (by_chance * squared).sum((-2, -1)),
    }


class LossMean(Metric):
    """Means of the parts of a loss over all rows of an epoch and all processes, whatever the batches are.

    Args:
        parts: Number of parts ``L``.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(parts, dtype=torch.float32), "sum")
        self.add_state("counts", torch.zeros(parts, dtype=torch.float32), "sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Adds what a batch holds: the sum of each part and what it is to be divided by, ``[L]`` both."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> Tensor:
        """``[L]``; 0 where nothing was counted."""
        return self.sums / self.counts.where(self.counts > 0, 1.0)


class SubsetMetrics:
    """:class:`LevelMetrics` over all rows and over each named part of them.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        self.preferences = preferences
        self._parts: dict[str, LevelMetrics] = {}

    def update(self, predicted: Tensor, levels: Tensor, subsets: Sequence[str | None]) -> None:
        """Counts a batch: levels ``[B, D]`` as in :meth:`LevelMetrics.update`, and the part each row belongs to."""
        self._part("", predicted.device).update(predicted, levels)
        for name in sorted({s for s in subsets if s}):
            rows = torch.tensor([s == name for s in subsets], device=predicted.device)
            self._part(name, predicted.device).update(predicted[rows], levels[rows])

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """``dimension/measure`` over all rows, ``subset/dimension/measure`` over parts.

        Every process must call it. A part may be unknown to some of them, so the names are exchanged first.
        """
        names: set[str] = set().union(*gathered(set(self._parts)))
        result: dict[str, Tensor] = {}
        for name in sorted(names):
            prefix = f"{name}/" if name else ""
            result |= {f"{prefix}{key}": value for key, value in self._part(name, device).compute().items()}
        return result

    def reset(self) -> None:
        """Forgets everything."""
        self._parts.clear()

    def _part(self, name: str, device: torch.device) -> LevelMetrics:
        if name not in self._parts:
            self._parts[name] = LevelMetrics(self.preferences).to(device)
        return self._parts[name]


_ROUNDING = 1e-5
"""Score margins up to this are ties: two places in a batch do not give the very same numbers for the same answer."""


class _Stacked:
    """Parts of equal first axis, on CPU: tensors or lists; a dataclass."""

    subsets: list[str | None]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Joins what several batches or processes gave."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]  # type: ignore[arg-type]
        return cls(*(torch.cat(c) if isinstance(c[0], Tensor) else [x for part in c for x in part] for c in columns))

    def of_subset(self, name: str) -> Self:
        """Keeps what belongs to a named part of the data."""
        return self.select(torch.tensor([subset == name for subset in self.subsets]))

    def select(self, rows: Tensor) -> Self:
        """Keeps the rows of a mask ``[N]`` bool."""
        kept = rows.nonzero()[:, 0]
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(v[kept] if isinstance(v, Tensor) else [v[i] for i in kept.tolist()] for v in values))


@dataclass
class ScoredRows(_Stacked):
    """``N`` scored answers; ``D`` dimensions of up to ``K`` levels.

    Args:
        probs: ``[N, D, K]`` float64, 0 on levels that a dimension lacks.
        raw: ``[N, D, K]`` float64, the same without the temperatures that calibrate the heads.
        levels: ``[N, D]`` int64, -1 = not labelled.
        targets: ``[N, D, K]`` float64, share of the raters that gave each level; all 0 where not labelled.
        requested: ``[N, D]`` int64, level that a policy was asked for when it gave the answer, -1 = none.
        question: ``[N]`` int64, equal for answers to the same question.
        length: ``[N]`` int64, characters of the answer.
        subsets: Named part of the data that each row belongs to.
    """

    probs: Tensor
    raw: Tensor
    levels: Tensor
    targets: Tensor
    requested: Tensor
    question: Tensor
    length: Tensor
    subsets: list[str | None]

    def __len__(self) -> int:
        return len(self.subsets)


@dataclass
class ScoredPairs(_Stacked):
    """``P`` comparisons of two answers to one question.

    Args:
        score_margins: ``[P, D]`` float64, expected level of the chosen completion less that of the rejected.
        comparison_mask: ``[P, D]`` bool, the dimensions that each comparison speaks about.
        question: ``[P]`` int64, equal for comparisons of the same question.
        subsets: Named part of the data that each comparison belongs to.
    """

    score_margins: Tensor
    comparison_mask: Tensor
    question: Tensor
    subsets: list[str | None]

    def __len__(self) -> int:
        return len(self.question)


class ScoreCollector:
    """Collects what a test sees, batch by batch.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        dimensions, width = len(preferences), max(preferences.sizes)
        number, level = torch.empty(0, dtype=torch.long), torch.empty(0, dimensions, dtype=torch.long)
        probs = torch.empty(0, dimensions, width, dtype=torch.float64)
        self._preferences = preferences
        self._no_rows = ScoredRows(probs, probs, level, probs, level, number, number, [])
        self._no_pairs = ScoredPairs(level.double(), level.bool(), number, [])
        self.clear()

    def clear(self) -> None:
        """Forgets what an interrupted test collected."""
        self._rows, self._pairs = [self._no_rows], [self._no_pairs]

    def add(self, batch: PairBatch, probs: Tensor, raw: Tensor) -> None:
        """Takes a batch and its probabilities ``[B, D, K]``, calibrated and not. Unlabelled answers count in pairs."""
        probs, raw, targets = (values.detach().double().cpu() for values in (probs, raw, batch.targets))
        question = torch.tensor([question_number(row.group or row.question) for row in batch.rows], dtype=torch.long)
        length = torch.tensor([len(row.answer or "") for row in batch.rows], dtype=torch.long)
        subsets = [row.subset for row in batch.rows]
        asked = [self._preferences.encode(known_levels(row.requested, self._preferences)) for row in batch.rows]
        requested = torch.stack(asked)
        rows = ScoredRows(probs, raw, batch.levels.cpu(), targets, requested, question, length, subsets)
        self._rows.append(rows.select(targets.any(-1).any(-1)))
        expected, chosen, rejected = expected_level(probs), batch.chosen.cpu(), batch.rejected.cpu()
        score_margins = expected[chosen] - expected[rejected]
        score_margins = score_margins.where(score_margins.abs() > _ROUNDING, 0.0)
        parts = [subsets[row] for row in chosen.tolist()]
        self._pairs.append(ScoredPairs(score_margins, batch.comparison_mask.cpu(), question[chosen], parts))

    def gathered(self) -> tuple[ScoredRows, ScoredPairs]:
        """The rows and pairs of all processes; every process must ask."""
        parts = gathered((ScoredRows.concat(self._rows), ScoredPairs.concat(self._pairs)))
        return ScoredRows.concat([rows for rows, _ in parts]), ScoredPairs.concat([pairs for _, pairs in parts])
