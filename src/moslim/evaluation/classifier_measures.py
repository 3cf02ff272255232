"""Measures of a classifier's levels against labels, lengths, comparisons and requests.

Pure functions on tensors; NaN stands for undefined values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.evaluation.classifier_records import ScoredPairs, ScoredRows, bootstrap_interval, measures, rank_correlation
from moslim.preferences import INACTIVE, PreferenceSet, expected_level, requested_probability
from moslim.reward.heads import calibration_measures, top_reliability
from moslim.reward.losses import MISSING, credit
from moslim.utils.errors import UsageError
from moslim.utils.files import Result

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
    are labelled or predicted; the others are those of :func:`moslim.evaluation.classifier_records.measures`.
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
    """Measures of a constant prediction: the most frequent level of these rows, the lowest on a tie."""
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


def calibration_of(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    """Calibration of every head on its labelled rows.

    Args:
        rows: ``N`` scored answers.
        preferences: The ``D`` dimensions.

    Returns:
        By dimension: ``ece``, ``classwise_ece`` (mean over levels of the error of that level's probability), ``brier``,
        ``rps``, and ``bins`` of the most probable level's reliability: ``confidence``, ``accuracy``, ``count``.
        ``uncalibrated`` holds the same at temperature 1, null where no temperatures are in use. A dimension without
        labels has null.
    """
    found: Result = {}
    for d, (name, size) in enumerate(zip(preferences.names, preferences.sizes, strict=True)):
        labelled = rows.targets[:, d].any(-1)
        targets = rows.targets[labelled, d, :size]
        probs, raw = rows.probs[labelled, d, :size], rows.raw[labelled, d, :size]
        if not len(targets):
            found[name] = None
            continue
        uncalibrated = None if torch.equal(probs, raw) else _figures(raw, targets)
        found[name] = {**_figures(probs, targets), "uncalibrated": uncalibrated}
    return found


def _figures(probs: Tensor, targets: Tensor) -> Result:
    top = top_reliability(probs, targets)
    return {
        **calibration_measures(probs, targets),
        "bins": {
            "confidence": top.confidence,
            "accuracy": top.outcome,
            "count": (top.share * len(targets)).round().long(),
        },
    }


def length_dependence(rows: ScoredRows, names: Sequence[str]) -> Result:
    """Accuracy by the length of the answer, and how levels follow length: heads' beside labels', on the same rows.

    A head whose expected level follows length more closely than its labels do rewards length for its own sake.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``unit``; ``buckets`` of the lengths' quartiles, empty ones left out, each with its shortest and longest answer
        (``from``, ``to``), ``n_rows`` and ``accuracy`` by dimension; ``spearman`` with length by dimension, of the
        ``expected`` level and of the ``label``.
    """
    length = rows.length.double()
    quartiles = length.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) if len(rows) else length
    bucket = torch.bucketize(length, quartiles)
    known = rows.levels != MISSING
    right = (rows.probs.argmax(-1) == rows.levels).double().where(known, torch.nan)
    expected = expected_level(rows.probs)
    return {
        "unit": "characters",
        "buckets": [
            {
                "from": int(length[bucket == b].min()),
                "to": int(length[bucket == b].max()),
                "n_rows": int((bucket == b).sum()),
                "accuracy": dict(zip(names, right[bucket == b].nanmean(0), strict=True)),
            }
            for b in bucket.unique().tolist()
        ],
        "spearman": {
            name: {
                "expected": rank_correlation(length[known[:, d]], expected[known[:, d], d]),
                "label": rank_correlation(length[known[:, d]], rows.levels[known[:, d], d].double()),
            }
            for d, name in enumerate(names)
        },
    }


def head_correlation(rows: ScoredRows, names: Sequence[str]) -> Result:
    """Spearman's correlation between every two heads' expected levels, beside that of their labels.

    Both are taken over the rows that are labelled on both dimensions. What the heads share beyond the labels is the
    classifier's own (a halo effect).

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``names``; ``expected`` and ``label``, ``[D, D]``; ``excess``, the mean over pairs of heads of
        ``|expected| - |label|``.
    """
    expected, labels = expected_level(rows.probs), rows.levels.double()
    known = rows.levels != MISSING

    def matrix(values: Tensor) -> Tensor:
        cells = [
            rank_correlation(values[known[:, i] & known[:, j], i], values[known[:, i] & known[:, j], j])
            for i in range(len(names))
            for j in range(len(names))
        ]
        return torch.stack(cells).reshape(len(names), len(names))

    found, wanted = matrix(expected), matrix(labels)
    different = ~torch.eye(len(names), dtype=torch.bool)
    excess = (found.abs() - wanted.abs())[different].nanmean()
    return {"names": list(names), "expected": found, "label": wanted, "excess": excess}


def pairwise(pairs: ScoredPairs, preferences: PreferenceSet, weights: Mapping[str, float] | None = None) -> Result:
    """Pairwise accuracy of every head, and of a weighted sum of expected levels; a tie counts half.

    The sum runs over the dimensions that a comparison speaks about; comparisons about none that has a weight are left
    out of it.

    Args:
        pairs: ``P`` comparisons.
        preferences: The ``D`` dimensions.
        weights: Weight by dimension, 0 where absent; None = 1 for all.

    Returns:
        ``n_pairs``; ``dimensions`` and ``weighted``, each with ``accuracy``, its ``interval`` over questions and
        ``n_pairs``; ``weighted`` also with ``weights``. The same of each part of the data under ``subsets``.

    Raises:
        UsageError: A weight is for an unknown dimension, or all are 0.
    """
    used = complete_weights(preferences, weights)
    named = sorted({subset for subset in pairs.subsets if subset})
    parts = {name: _pairwise(pairs.of_subset(name), preferences, used) for name in named}
    return {**_pairwise(pairs, preferences, used), "subsets": parts}


def _pairwise(pairs: ScoredPairs, preferences: PreferenceSet, used: dict[str, float]) -> Result:
    factors = torch.tensor(list(used.values()), dtype=torch.float64) * pairs.comparison_mask
    return {
        "n_pairs": len(pairs),
        "dimensions": {
            name: _accuracy(pairs.score_margins[:, d], pairs.comparison_mask[:, d], pairs.question)
            for d, name in enumerate(preferences.names)
        },
        "weighted": {
            "weights": used,
            **_accuracy((pairs.score_margins * factors).sum(1), (factors != 0).any(1), pairs.question),
        },
    }


def complete_weights(preferences: PreferenceSet, weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of every dimension; see :func:`pairwise`."""
    if weights is None:
        return dict.fromkeys(preferences.names, 1.0)
    if unknown := set(weights) - set(preferences.names):
        raise UsageError(
            f"pair_weights names {', '.join(sorted(unknown))}; there are the dimensions {', '.join(preferences.names)}"
        )
    if not any(weights.values()):
        raise UsageError("pair_weights are all 0, so that every comparison would be a tie: give one dimension a weight")
    return {name: float(weights.get(name, 0.0)) for name in preferences.names}


def _accuracy(score_margins: Tensor, counted: Tensor, question: Tensor) -> Result:
    questions, question = question[counted].unique(return_inverse=True)
    right = credit(score_margins[counted])
    sums = right.new_zeros(2, len(questions)).index_add_(1, question, torch.stack([right, torch.ones_like(right)]))

    def accuracy(weights: Tensor) -> Tensor:
        return (weights @ sums[0]) / (weights @ sums[1])

    return {
        "accuracy": right.mean(),
        "interval": bootstrap_interval(accuracy, len(questions)),
        "n_pairs": len(right),
    }


def proxy_and_gold(rows: ScoredRows, names: Sequence[str]) -> Result | None:
    """Agreement of a policy's answers with its requests, by the classifier and by the labels, on the same answers.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``dimensions`` and their ``mean``, each with ``n_rows``; ``proxy``, the mean probability of the requested level;
        ``gold``, the share of labels that are this level; ``gap``, proxy minus gold, and its ``interval`` over
        questions. None where no labelled answer was asked for anything.
    """
    asked = rows.requested.masked_fill(rows.levels == MISSING, INACTIVE)
    counted = asked != INACTIVE
    if not counted.any():
        return None
    proxy, gold = requested_probability(rows.probs, asked), requested_probability(rows.targets, asked)
    questions, question = rows.question.unique(return_inverse=True)
    differences = gold.new_zeros(len(questions), len(names)).index_add_(0, question, (proxy - gold).nan_to_num(0.0))
    counts = torch.zeros_like(differences).index_add_(0, question, counted.to(differences.dtype))

    def gap(weights: Tensor) -> Tensor:
        return (weights @ differences) / (weights @ counts)

    intervals = bootstrap_interval(gap, len(questions)).T
    values = {"proxy": proxy.nanmean(0), "gold": gold.nanmean(0), "gap": (proxy - gold).nanmean(0)}
    return {
        "dimensions": {
            name: {
                "n_rows": counted[:, d].sum(),
                **{kind: value[d] for kind, value in values.items()},
                "interval": intervals[d],
            }
            for d, name in enumerate(names)
        },
        "mean": {
            "n_rows": counted.any(1).sum(),
            **{kind: value.nanmean() for kind, value in values.items()},
            "interval": bootstrap_interval(lambda weights: gap(weights).nanmean(1), len(questions)),
        },
    }
