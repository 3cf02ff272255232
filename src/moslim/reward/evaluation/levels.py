"""How well one head's levels agree with its labels. Pure functions on tensors; NaN stands for what is not defined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.levels import expected_level
from moslim.reward.evaluation.rows import ScoredRows
from moslim.reward.losses import MISSING
from moslim.reward.metrics import measures
from moslim.statistics import bootstrap_interval, rank_correlation

MEASURES = ("accuracy", "balanced_accuracy", "within_one", "mae", "kappa", "macro_f1", "spearman", "auroc")
WITH_INTERVAL = ("accuracy", "within_one", "kappa")


@dataclass
class Labelled:
    """The ``N`` labelled rows of one head with ``K`` levels.

    Args:
        probs: ``[N, K]`` float64.
        levels: ``[N]`` int64.
        question: ``[N]`` int64, numbered from 0 to ``questions - 1``.
        questions: Number of questions, ``Q``.
    """

    probs: Tensor
    levels: Tensor
    question: Tensor
    questions: int

    @classmethod
    def of(cls, rows: ScoredRows, head: int, size: int) -> Labelled:
        """Takes the rows that are labelled on one head, which has ``size`` levels."""
        known = rows.levels[:, head] != MISSING
        questions, question = rows.question[known].unique(return_inverse=True)
        return cls(rows.probs[known, head, :size], rows.levels[known, head], question, len(questions))

    @property
    def expected(self) -> Tensor:
        """Expected level ``[N]``."""
        return expected_level(self.probs)

    def confusions(self) -> Tensor:
        """Confusion matrix of every question, ``[Q, K, K]`` float64; rows = labelled level, columns = predicted."""
        size = self.probs.shape[1]
        cell = (self.question * size + self.levels) * size + self.probs.argmax(1)
        return cell.bincount(minlength=self.questions * size**2).reshape(-1, size, size).double()


def level_measures(rows: Labelled) -> dict[str, Tensor]:
    """:data:`MEASURES` of one head, scalars. AUROC is there for two levels only, Spearman for labels that differ."""
    differ = len(rows.levels.unique()) > 1
    return {
        **matrix_measures(rows.confusions().sum(0)),
        "spearman": rank_correlation(rows.levels, rows.expected) if differ else torch.tensor(torch.nan),
        "auroc": auroc(rows.probs[:, 1], rows.levels == 1) if _is_binary(rows) else torch.tensor(torch.nan),
    }


def matrix_measures(confusion: Tensor) -> dict[str, Tensor]:
    """The measures that can be read off a confusion matrix ``[..., K, K]``.

    ``balanced_accuracy`` is the mean recall of the levels that are labelled, ``macro_f1`` the mean F1 of those that
    are labelled or predicted; the others are those of :func:`moslim.reward.metrics.measures`.
    """
    hits = confusion.diagonal(dim1=-2, dim2=-1)
    f1 = 2 * hits / (confusion.sum(-1) + confusion.sum(-2))
    return {
        **measures(confusion),
        "balanced_accuracy": recall(confusion).nanmean(-1),
        "macro_f1": f1.nanmean(-1),
    }


def recall(confusion: Tensor) -> Tensor:
    """Share of each labelled level's rows that were found, ``[..., K, K]`` to ``[..., K]``; NaN for absent levels."""
    return confusion.diagonal(dim1=-2, dim2=-1) / confusion.sum(-1)


def auroc(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """Chance that a positive row scores above a negative one, a tie counting half: the area under the ROC curve.

    This is the Mann-Whitney statistic over the number of pairs (Hanley and McNeil 1982).

    Args:
        scores: ``[N]``.
        positive: ``[N]`` bool.
        weights: ``[..., N]``, how often each row counts; None = once.

    Returns:
        ``[...]``; NaN where one of the classes is absent.
    """
    weights = scores.new_ones(scores.shape) if weights is None else weights
    values, place = scores.unique(return_inverse=True)
    empty = weights.new_zeros(*weights.shape[:-1], len(values))
    positives = empty.index_add(-1, place, weights * positive)
    negatives = empty.index_add(-1, place, weights * ~positive)
    beaten = negatives.cumsum(-1) - negatives / 2
    return (positives * beaten).sum(-1) / (positives.sum(-1) * negatives.sum(-1))


def level_intervals(rows: Labelled) -> dict[str, Tensor]:
    """95% bootstrap intervals ``[2]`` over questions of :data:`WITH_INTERVAL` and, with two levels, AUROC."""
    confusions = rows.confusions()

    def from_matrix(weights: Tensor) -> Tensor:
        found = measures((weights @ confusions.flatten(1)).unflatten(1, confusions.shape[1:]))
        return torch.stack([found[name] for name in WITH_INTERVAL], dim=1)

    def area(weights: Tensor) -> Tensor:
        return auroc(rows.probs[:, 1], rows.levels == 1, weights[:, rows.question])

    ends = bootstrap_interval(from_matrix, rows.questions)
    intervals = dict(zip(WITH_INTERVAL, ends.unbind(1), strict=True))
    return intervals | ({"auroc": bootstrap_interval(area, rows.questions)} if _is_binary(rows) else {})


def majority(rows: Labelled) -> dict[str, int | Tensor | None]:
    """What always saying these rows' most frequent level would score; the lowest of several."""
    if not len(rows.levels):
        return {"level": None, "accuracy": None, "within_one": None}
    level = int(rows.levels.bincount().argmax())
    distance = (rows.levels - level).abs()
    return {
        "level": level,
        "accuracy": (distance == 0).double().mean(),
        "within_one": (distance <= 1).double().mean(),
    }


def _is_binary(rows: Labelled) -> bool:
    return rows.probs.shape[1] == 2
