"""How often the classifier prefers the answer that people preferred."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.preferences import PreferenceSet
from moslim.reporting import Result
from moslim.reward.comparisons import credit
from moslim.reward.evaluation.rows import ScoredPairs
from moslim.statistics import bootstrap_interval


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
