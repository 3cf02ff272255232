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
"""Number of resamples of a bootstrap interval."""
_MAX_COUNTS = 2**20
"""Entries of the count matrix of one chunk of resamples; limits the memory."""


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last axis of ``[..., K]``; ties get their average rank, NaN gets NaN."""
    comparable = values.nan_to_num(nan=torch.inf)
    ordered = comparable.sort(dim=-1).values
    num_lower = torch.searchsorted(ordered, comparable)
    num_not_higher = torch.searchsorted(ordered, comparable, right=True)
    return ((num_lower + num_not_higher + 1) / 2).where(~values.isnan(), torch.nan).to(values.dtype)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation along the last axis, with average ranks for ties.

    Args:
        x: ``[K]`` or ``[..., K]``.
        y: ``[..., K]``; points where it is NaN are left out.

    Returns:
        ``[...]``; 0 where ``x`` or ``y`` is constant, NaN with fewer than two points.
    """
    present = ~y.isnan()
    count = present.sum(dim=-1, keepdim=True)
    mean_rank = (count + 1) / 2
    x_ranks = average_ranks(x.to(y.dtype).where(present, torch.nan)).sub(mean_rank).nan_to_num(0.0)
    y_ranks = average_ranks(y).sub(mean_rank).nan_to_num(0.0)
    scale = (x_ranks.square().sum(dim=-1) * y_ranks.square().sum(dim=-1)).sqrt()
    rho = torch.where(scale > 0, (x_ranks * y_ranks).sum(dim=-1) / scale.clamp_min(1e-12), 0.0)
    return rho.where(count.squeeze(-1) >= 2, torch.nan)


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], num_questions: int, resamples: int = RESAMPLES, seed: int = 0
) -> Tensor:
    """95% percentile bootstrap interval of a statistic (Efron 1979), by resampling questions.

    Questions are resampled instead of rows, since answers to the same question are not independent.

    Args:
        statistic: Function from the counts of each question in each resample, ``[R, Q]`` float64, to the statistic of
            each resample, ``[R, ...]``; NaN where it is undefined.
        num_questions: ``Q``.
        resamples: Number of resamples.
        seed: Seed of the resamples, which are the same for every statistic, so that intervals can be compared.

    Returns:
        Lower and upper bound, ``[2, ...]``; NaN with fewer than two questions.
    """
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _MAX_COUNTS // max(num_questions, 1))
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    values = torch.cat([statistic(_question_counts(size, num_questions, generator)) for size in sizes])
    bounds = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return bounds if num_questions >= 2 else torch.full_like(bounds, torch.nan)


def _question_counts(resamples: int, num_questions: int, generator: torch.Generator) -> Tensor:
    """Counts of each question in each resample, ``[R, Q]``."""
    counts = torch.zeros(resamples, num_questions, dtype=torch.float64)
    if num_questions:
        indices = torch.randint(num_questions, (resamples, num_questions), generator=generator)
        counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=torch.float64))
    return counts


class HeldOut(Metric):
    """Collects the labelled rows of a validation epoch for :func:`moslim.reward.heads.calibrate`."""

    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]
    questions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "targets", "questions"):
            self.add_state(name, [], "cat")

    def update(self, logits: Tensor, targets: Tensor, questions: Sequence[Question]) -> None:
        """Adds a batch: logits at temperature 1 and targets, both ``[B, D, K]``, and the ``B`` questions."""
        labelled = (targets > 0).any(-1).any(-1)
        hashes = torch.tensor([question_number(question) for question in questions], device=logits.device)
        self.logits.append(logits[labelled])
        self.targets.append(targets[labelled])
        self.questions.append(hashes[labelled])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits and targets ``[N, D, K]`` and a hash of each question ``[N]``; a collective call."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.targets), dim_zero_cat(self.questions)


def question_number(question: Question) -> int:
    """Returns a 64-bit hash of :func:`question_key`, the same in every process."""
    digest = hashlib.sha256(question_key(question).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


MEASURES = ("accuracy", "within_one", "mae", "kappa")
"""Keys of :func:`measures`."""


class LevelMetrics(Metric):
    """Accuracy, within-one accuracy, mean absolute error and quadratic weighted kappa of every head.

    All four are computed at the end of the epoch, from one confusion matrix per head.

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
        """Adds a batch: predicted and labelled levels, both ``[B, D]``; the label -1 does not count."""
        width = self.confusion.shape[-1]
        labelled = (levels != MISSING)[..., None]
        one_hot_labels = F.one_hot(levels.clamp(min=0), width) * labelled
        one_hot_predictions = F.one_hot(predicted, width)
        self.confusion += (one_hot_labels[..., None] * one_hot_predictions[..., None, :]).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``dimension/measure`` and the means over heads, ``mean/measure``, without undefined values.

        A head without labels has no values; kappa is undefined if labels and predictions are one single level.
        """
        by_head = {name: measures(matrix) for name, matrix in zip(self.preferences.names, self.confusion, strict=True)}
        values = {f"{name}/{key}": value for name, head in by_head.items() for key, value in head.items()}
        values |= {f"mean/{key}": torch.stack([head[key] for head in by_head.values()]).nanmean() for key in MEASURES}
        return {key: value.float() for key, value in values.items() if not value.isnan()}


def measures(confusion: Tensor) -> dict[str, Tensor]:
    """The measures :data:`MEASURES` of a confusion matrix, ``[...]`` float64; NaN where undefined.

    Args:
        confusion: ``[..., K, K]`` counts, rows = labelled level, columns = predicted.
    """
    confusion = confusion.cpu().double()
    total = confusion.sum((-2, -1))
    levels = torch.arange(confusion.shape[-1])
    distance = (levels[:, None] - levels).abs()
    squared = distance.square()
    expected = confusion.sum(-1, keepdim=True) @ confusion.sum(-2, keepdim=True) / total[..., None, None]
    return {
        "accuracy": confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / total,
        "within_one": (confusion * (distance <= 1)).sum((-2, -1)) / total,
        "mae": (confusion * distance).sum((-2, -1)) / total,
        # Cohen 1968, with quadratic weights; 0 / 0 = NaN if labels and predictions are one single level
        "kappa": 1 - (confusion * squared).sum((-2, -1)) / (expected * squared).sum((-2, -1)),
    }


class LossMean(Metric):
    """Means of the terms of a loss over an epoch and all processes, independent of the batches.

    Args:
        num_terms: Number of terms, ``L``.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_terms, dtype=torch.float32), "sum")
        self.add_state("counts", torch.zeros(num_terms, dtype=torch.float32), "sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Adds a batch: the sum of each term and its denominator, both ``[L]``."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> Tensor:
        """Returns the means ``[L]``; 0 where the denominator is 0."""
        return self.sums / self.counts.where(self.counts > 0, 1.0)


class SubsetMetrics:
    """:class:`LevelMetrics` of all rows and of each named subset.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        self.preferences = preferences
        self._metrics: dict[str, LevelMetrics] = {}

    def update(self, predicted: Tensor, levels: Tensor, subsets: Sequence[str | None]) -> None:
        """Adds a batch: levels ``[B, D]`` as in :meth:`LevelMetrics.update`, and the subset of each row."""
        self._of_subset("", predicted.device).update(predicted, levels)
        for name in sorted({subset for subset in subsets if subset}):
            mask = torch.tensor([subset == name for subset in subsets], device=predicted.device)
            self._of_subset(name, predicted.device).update(predicted[mask], levels[mask])

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """Returns ``dimension/measure`` of all rows and ``subset/dimension/measure`` of subsets; a collective call."""
        # A process may have no rows of a subset, and the metrics of a subset are reduced over all processes.
        names: set[str] = set().union(*gathered(set(self._metrics)))
        result: dict[str, Tensor] = {}
        for name in sorted(names):
            prefix = f"{name}/" if name else ""
            result |= {f"{prefix}{key}": value for key, value in self._of_subset(name, device).compute().items()}
        return result

    def reset(self) -> None:
        """Discards all counts."""
        self._metrics.clear()

    def _of_subset(self, name: str, device: torch.device) -> LevelMetrics:
        if name not in self._metrics:
            self._metrics[name] = LevelMetrics(self.preferences).to(device)
        return self._metrics[name]


_TIE_TOLERANCE = 1e-5
"""Largest score margin that counts as a tie: scores of equal answers differ by rounding within a batch."""


class _Stacked:
    """Base of dataclasses whose fields are CPU tensors or lists with the same first axis ``N``."""

    subsets: list[str | None]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Concatenates the records of several batches or processes."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]  # type: ignore[arg-type]
        return cls(*(torch.cat(c) if isinstance(c[0], Tensor) else [x for part in c for x in part] for c in columns))

    def of_subset(self, name: str) -> Self:
        """Selects the rows of a named subset."""
        return self.select(torch.tensor([subset == name for subset in self.subsets]))

    def select(self, mask: Tensor) -> Self:
        """Selects the rows of a mask ``[N]`` bool."""
        indices = mask.nonzero()[:, 0]
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(v[indices] if isinstance(v, Tensor) else [v[i] for i in indices.tolist()] for v in values))


@dataclass
class ScoredRows(_Stacked):
    """``N`` scored answers; ``D`` dimensions of up to ``K`` levels.

    Args:
        probs: ``[N, D, K]`` float64, 0 on levels that a dimension lacks.
        raw: ``[N, D, K]`` float64, probabilities at temperature 1.
        levels: ``[N, D]`` int64, labels, -1 = none.
        targets: ``[N, D, K]`` float64, share of the raters that gave each level; all 0 without a label.
        requested: ``[N, D]`` int64, requested level if the answer is a policy's, -1 = none.
        question: ``[N]`` int64, equal for answers to the same question.
        length: ``[N]`` int64, characters of the answer.
        subsets: Subset of the data that each row belongs to.
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
class ScoredComparisons(_Stacked):
    """``P`` comparisons of a chosen and a rejected answer to one question.

    Args:
        score_margins: ``[P, D]`` float64, expected level of the chosen minus that of the rejected answer.
        comparison_mask: ``[P, D]`` bool, dimensions that are compared.
        question: ``[P]`` int64, equal for comparisons on the same question.
        subsets: Subset of the data that each comparison belongs to.
    """

    score_margins: Tensor
    comparison_mask: Tensor
    question: Tensor
    subsets: list[str | None]

    def __len__(self) -> int:
        return len(self.question)


class ScoreCollector:
    """Collects the scores, labels and comparisons of a test.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        num_dimensions, width = len(preferences), max(preferences.sizes)
        ids, levels = torch.empty(0, dtype=torch.long), torch.empty(0, num_dimensions, dtype=torch.long)
        probs = torch.empty(0, num_dimensions, width, dtype=torch.float64)
        self._preferences = preferences
        self._no_rows = ScoredRows(probs, probs, levels, probs, levels, ids, ids, [])
        self._no_comparisons = ScoredComparisons(levels.double(), levels.bool(), ids, [])
        self.clear()

    def clear(self) -> None:
        """Discards the records of an interrupted test."""
        self._rows, self._comparisons = [self._no_rows], [self._no_comparisons]

    def add(self, batch: PairBatch, probs: Tensor, raw: Tensor) -> None:
        """Adds the labelled rows and the comparisons of a batch.

        Args:
            batch: ``B`` rows; unlabelled ones count in comparisons only.
            probs: ``[B, D, K]`` calibrated level probabilities.
            raw: ``[B, D, K]`` level probabilities at temperature 1.
        """
        probs, raw, targets = (values.detach().double().cpu() for values in (probs, raw, batch.targets))
        question = torch.tensor([question_number(row.group or row.question) for row in batch.rows], dtype=torch.long)
        length = torch.tensor([len(row.answer or "") for row in batch.rows], dtype=torch.long)
        subsets = [row.subset for row in batch.rows]
        preferences = [known_levels(row.requested, self._preferences) for row in batch.rows]
        requested = torch.stack([self._preferences.encode(preference) for preference in preferences])
        rows = ScoredRows(probs, raw, batch.levels.cpu(), targets, requested, question, length, subsets)
        self._rows.append(rows.select(targets.any(-1).any(-1)))
        expected, chosen, rejected = expected_level(probs), batch.chosen.cpu(), batch.rejected.cpu()
        score_margins = expected[chosen] - expected[rejected]
        score_margins = score_margins.where(score_margins.abs() > _TIE_TOLERANCE, 0.0)
        mask, chosen_subsets = batch.comparison_mask.cpu(), [subsets[row] for row in chosen.tolist()]
        self._comparisons.append(ScoredComparisons(score_margins, mask, question[chosen], chosen_subsets))

    def gathered(self) -> tuple[ScoredRows, ScoredComparisons]:
        """Returns the rows and comparisons of all processes; a collective call."""
        parts = gathered((ScoredRows.concat(self._rows), ScoredComparisons.concat(self._comparisons)))
        return (
            ScoredRows.concat([rows for rows, _ in parts]),
            ScoredComparisons.concat([comparisons for _, comparisons in parts]),
        )
