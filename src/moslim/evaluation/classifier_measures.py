"""Measures of a classifier's levels against labels, lengths, comparisons and requests.

Pure functions on tensors; NaN stands for undefined values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.evaluation.classifier_records import (
    ScoredComparisons,
    ScoredRows,
    bootstrap_interval,
    measures,
    rank_correlation,
)
from moslim.preferences import INACTIVE, PreferenceSet, expected_level, requested_probability
from moslim.reward.heads import calibration_measures, top_reliability
from moslim.reward.losses import MISSING, credit
from moslim.utils.errors import UsageError
from moslim.utils.files import Result

MEASURES = ("accuracy", "balanced_accuracy", "within_one", "mae", "kappa", "macro_f1", "spearman", "auroc")
"""Keys of a head's measures."""
WITH_INTERVAL = ("accuracy", "within_one", "kappa")
"""Measures of the confusion matrix that are reported with an interval."""


@dataclass
class LabelledRows:
    """The ``N`` labelled rows of one head with ``K`` levels.

    Args:
        probs: ``[N, K]`` float64, level probabilities.
        levels: ``[N]`` int64, labels.
        question: ``[N]`` int64, index of the question, from 0 to ``Q - 1``.
        num_questions: Number of questions, ``Q``.
    """

    probs: Tensor
    levels: Tensor
    question: Tensor
    num_questions: int

    @classmethod
    def of(cls, rows: ScoredRows, head: int, size: int) -> LabelledRows:
        """Selects the rows with a label for the head at index ``head``, which has ``size`` levels."""
        labelled = rows.levels[:, head] != MISSING
        questions, question = rows.question[labelled].unique(return_inverse=True)
        return cls(rows.probs[labelled, head, :size], rows.levels[labelled, head], question, len(questions))

    @property
    def expected(self) -> Tensor:
        """Expected level ``[N]``."""
        return expected_level(self.probs)

    def confusions(self) -> Tensor:
        """Confusion matrix of every question, ``[Q, K, K]`` float64; rows = labelled level, columns = predicted."""
        size = self.probs.shape[1]
        cells = (self.question * size + self.levels) * size + self.probs.argmax(1)
        return cells.bincount(minlength=self.num_questions * size**2).reshape(-1, size, size).double()


def level_measures(rows: LabelledRows) -> dict[str, Tensor]:
    """:data:`MEASURES` of one head, scalars.

    ``auroc`` is defined for two levels only, ``spearman`` for at least two different labels.
    """
    varied = len(rows.levels.unique()) > 1
    return {
        **matrix_measures(rows.confusions().sum(0)),
        "spearman": rank_correlation(rows.levels, rows.expected) if varied else torch.tensor(torch.nan),
        "auroc": auroc(rows.probs[:, 1], rows.levels == 1) if _is_binary(rows) else torch.tensor(torch.nan),
    }


def matrix_measures(confusion: Tensor) -> dict[str, Tensor]:
    """Measures of a confusion matrix ``[..., K, K]``.

    Adds to :func:`moslim.evaluation.classifier_records.measures` ``balanced_accuracy``, the mean recall of levels that
    occur as labels, and ``macro_f1``, the mean F1 of levels that occur as labels or predictions.
    """
    correct = confusion.diagonal(dim1=-2, dim2=-1)
    f1 = 2 * correct / (confusion.sum(-1) + confusion.sum(-2))
    return {
        **measures(confusion),
        "balanced_accuracy": recall(confusion).nanmean(-1),
        "macro_f1": f1.nanmean(-1),
    }


def recall(confusion: Tensor) -> Tensor:
    """Recall of each level, ``[..., K, K]`` to ``[..., K]``; NaN for levels without labels."""
    return confusion.diagonal(dim1=-2, dim2=-1) / confusion.sum(-1)


def auroc(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the ROC curve: the probability that a positive row scores above a negative one; a tie counts half.

    Computed as the Mann-Whitney statistic divided by the number of pairs (Hanley and McNeil 1982).

    Args:
        scores: ``[N]``.
        positive: ``[N]`` bool.
        weights: ``[..., N]``, count of each row; None = 1.

    Returns:
        ``[...]``; NaN where one of the classes is absent.
    """
    weights = scores.new_ones(scores.shape) if weights is None else weights
    values, value_indices = scores.unique(return_inverse=True)
    zeros = weights.new_zeros(*weights.shape[:-1], len(values))
    positives = zeros.index_add(-1, value_indices, weights * positive)
    negatives = zeros.index_add(-1, value_indices, weights * ~positive)
    lower_negatives = negatives.cumsum(-1) - negatives / 2
    return (positives * lower_negatives).sum(-1) / (positives.sum(-1) * negatives.sum(-1))


def level_intervals(rows: LabelledRows) -> dict[str, Tensor]:
    """95% bootstrap intervals ``[2]`` over questions of :data:`WITH_INTERVAL` and, with two levels, AUROC."""
    confusions = rows.confusions()

    def matrix_statistics(question_counts: Tensor) -> Tensor:
        resampled = (question_counts @ confusions.flatten(1)).unflatten(1, confusions.shape[1:])
        values = measures(resampled)
        return torch.stack([values[name] for name in WITH_INTERVAL], dim=1)

    def auroc_statistic(question_counts: Tensor) -> Tensor:
        return auroc(rows.probs[:, 1], rows.levels == 1, question_counts[:, rows.question])

    bounds = bootstrap_interval(matrix_statistics, rows.num_questions)
    intervals = dict(zip(WITH_INTERVAL, bounds.unbind(1), strict=True))
    return intervals | ({"auroc": bootstrap_interval(auroc_statistic, rows.num_questions)} if _is_binary(rows) else {})


def majority_baseline(rows: LabelledRows) -> dict[str, int | Tensor | None]:
    """Measures of the constant prediction of the most frequent label, the lowest in a tie; None without labels."""
    if not len(rows.levels):
        return {"level": None, "accuracy": None, "within_one": None}
    level = int(rows.levels.bincount().argmax())
    distance = (rows.levels - level).abs()
    return {
        "level": level,
        "accuracy": (distance == 0).double().mean(),
        "within_one": (distance <= 1).double().mean(),
    }


def _is_binary(rows: LabelledRows) -> bool:
    return rows.probs.shape[1] == 2


def head_calibration(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    """Calibration of every head on its labelled rows.

    Args:
        rows: ``N`` scored answers.
        preferences: The ``D`` dimensions.

    Returns:
        By dimension: ``ece`` and ``classwise_ece`` (expected calibration error of the most probable level, and mean of
        that of every level), ``brier``, ``rps`` (ranked probability score), and ``bins`` of the most probable level's
        reliability: ``confidence``, ``accuracy``, ``count``. ``uncalibrated`` holds the same at temperature 1, None if
        all temperatures are 1. None for a dimension without labels.
    """
    result: Result = {}
    for d, (name, size) in enumerate(zip(preferences.names, preferences.sizes, strict=True)):
        labelled = rows.targets[:, d].any(-1)
        targets = rows.targets[labelled, d, :size]
        probs, raw = rows.probs[labelled, d, :size], rows.raw[labelled, d, :size]
        if not len(targets):
            result[name] = None
            continue
        uncalibrated = None if torch.equal(probs, raw) else _calibration_errors(raw, targets)
        result[name] = {**_calibration_errors(probs, targets), "uncalibrated": uncalibrated}
    return result


def _calibration_errors(probs: Tensor, targets: Tensor) -> Result:
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
    """Accuracy by length of the answer, and rank correlation of length with expected levels and with labels.

    A head whose expected level correlates more with length than its labels do rewards length itself.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``unit``; ``buckets``, the quartiles of length that are not empty, each with the length of its shortest and
        longest answer (``from``, ``to``), ``n_rows`` and ``accuracy`` by dimension; ``spearman`` with length by
        dimension, of the ``expected`` level and of the ``label``.
    """
    length = rows.length.double()
    quartiles = length.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) if len(rows) else length
    bucket = torch.bucketize(length, quartiles)
    labelled = rows.levels != MISSING
    correct = (rows.probs.argmax(-1) == rows.levels).double().where(labelled, torch.nan)
    expected = expected_level(rows.probs)
    return {
        "unit": "characters",
        "buckets": [
            {
                "from": int(length[bucket == b].min()),
                "to": int(length[bucket == b].max()),
                "n_rows": int((bucket == b).sum()),
                "accuracy": dict(zip(names, correct[bucket == b].nanmean(0), strict=True)),
            }
            for b in bucket.unique().tolist()
        ],
        "spearman": {
            name: {
                "expected": rank_correlation(length[labelled[:, d]], expected[labelled[:, d], d]),
                "label": rank_correlation(length[labelled[:, d]], rows.levels[labelled[:, d], d].double()),
            }
            for d, name in enumerate(names)
        },
    }


def head_correlation(rows: ScoredRows, names: Sequence[str]) -> Result:
    """Spearman's correlation between the expected levels of every two heads, and between their labels.

    Both are computed over the rows with labels for both dimensions. A stronger correlation of the heads than of the
    labels is a halo effect of the classifier.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``names``; ``expected`` and ``label``, ``[D, D]``; ``excess``, the mean over pairs of heads of
        ``|expected| - |label|``.
    """
    expected, labels = expected_level(rows.probs), rows.levels.double()
    labelled = rows.levels != MISSING

    def correlations(values: Tensor) -> Tensor:
        cells = []
        for i in range(len(names)):
            for j in range(len(names)):
                both = labelled[:, i] & labelled[:, j]
                cells.append(rank_correlation(values[both, i], values[both, j]))
        return torch.stack(cells).reshape(len(names), len(names))

    of_heads, of_labels = correlations(expected), correlations(labels)
    off_diagonal = ~torch.eye(len(names), dtype=torch.bool)
    excess = (of_heads.abs() - of_labels.abs())[off_diagonal].nanmean()
    return {"names": list(names), "expected": of_heads, "label": of_labels, "excess": excess}


def pairwise_accuracy(
    comparisons: ScoredComparisons, preferences: PreferenceSet, weights: Mapping[str, float] | None = None
) -> Result:
    """Pairwise accuracy of every head and of a weighted sum of expected levels; a tie counts half.

    The sum is over the dimensions in the mask of a comparison. It is not computed for comparisons whose mask has no
    dimension with a weight.

    Args:
        comparisons: ``P`` comparisons.
        preferences: The ``D`` dimensions.
        weights: Weight by dimension, 0 where absent; None = 1 for all.

    Returns:
        ``n_pairs``; ``dimensions`` and ``weighted``, each with ``accuracy``, its ``interval`` over questions and
        ``n_pairs``; ``weighted`` also has the ``weights``. ``subsets`` has the same for each subset of the data.

    Raises:
        UsageError: A weight names an unknown dimension, or all weights are 0.
    """
    weights = complete_weights(preferences, weights)
    names = sorted({subset for subset in comparisons.subsets if subset})
    subsets = {name: _pairwise_accuracy(comparisons.of_subset(name), preferences, weights) for name in names}
    return {**_pairwise_accuracy(comparisons, preferences, weights), "subsets": subsets}


def _pairwise_accuracy(comparisons: ScoredComparisons, preferences: PreferenceSet, weights: dict[str, float]) -> Result:
    score_margins, mask, question = comparisons.score_margins, comparisons.comparison_mask, comparisons.question
    masked_weights = torch.tensor(list(weights.values()), dtype=torch.float64) * mask
    return {
        "n_pairs": len(comparisons),
        "dimensions": {
            name: _accuracy(score_margins[:, d], mask[:, d], question) for d, name in enumerate(preferences.names)
        },
        "weighted": {
            "weights": weights,
            **_accuracy((score_margins * masked_weights).sum(1), (masked_weights != 0).any(1), question),
        },
    }


def complete_weights(preferences: PreferenceSet, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the weight of every dimension; see :func:`pairwise_accuracy`."""
    if weights is None:
        return dict.fromkeys(preferences.names, 1.0)
    if unknown := set(weights) - set(preferences.names):
        raise UsageError(
            f"pair_weights names {', '.join(sorted(unknown))}; there are the dimensions {', '.join(preferences.names)}"
        )
    if not any(weights.values()):
        raise UsageError("pair_weights are all 0, so that every comparison would be a tie: give one dimension a weight")
    return {name: float(weights.get(name, 0.0)) for name in preferences.names}


def _accuracy(score_margins: Tensor, mask: Tensor, question: Tensor) -> Result:
    questions, question_indices = question[mask].unique(return_inverse=True)
    correct = credit(score_margins[mask])
    correct_and_count = torch.stack([correct, torch.ones_like(correct)])
    sums = correct.new_zeros(2, len(questions)).index_add_(1, question_indices, correct_and_count)

    def accuracy(question_counts: Tensor) -> Tensor:
        return (question_counts @ sums[0]) / (question_counts @ sums[1])

    return {
        "accuracy": correct.mean(),
        "interval": bootstrap_interval(accuracy, len(questions)),
        "n_pairs": len(correct),
    }


def proxy_and_gold(rows: ScoredRows, names: Sequence[str]) -> Result | None:
    """Agreement of a policy's answers with their requests, by the classifier (proxy) and by the labels (gold).

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``dimensions`` and their ``mean``, each with ``n_rows``; ``proxy``, the mean probability of the requested level;
        ``gold``, the share of labels that equal it; ``gap``, proxy minus gold over the same answers, and its
        ``interval`` over questions. None if no labelled answer has a request.
    """
    requested = rows.requested.masked_fill(rows.levels == MISSING, INACTIVE)
    mask = requested != INACTIVE
    if not mask.any():
        return None
    proxy, gold = requested_probability(rows.probs, requested), requested_probability(rows.targets, requested)
    questions, question_indices = rows.question.unique(return_inverse=True)
    zeros = gold.new_zeros(len(questions), len(names))
    differences = zeros.index_add(0, question_indices, (proxy - gold).nan_to_num(0.0))
    counts = zeros.index_add(0, question_indices, mask.to(zeros.dtype))

    def gap(question_counts: Tensor) -> Tensor:
        return (question_counts @ differences) / (question_counts @ counts)

    intervals = bootstrap_interval(gap, len(questions)).T
    values = {"proxy": proxy.nanmean(0), "gold": gold.nanmean(0), "gap": (proxy - gold).nanmean(0)}
    return {
        "dimensions": {
            name: {
                "n_rows": mask[:, d].sum(),
                **{key: value[d] for key, value in values.items()},
                "interval": intervals[d],
            }
            for d, name in enumerate(names)
        },
        "mean": {
            "n_rows": mask.any(1).sum(),
            **{key: value.nanmean() for key, value in values.items()},
            "interval": bootstrap_interval(lambda weights: gap(weights).nanmean(1), len(questions)),
        },
    }
