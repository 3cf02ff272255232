"""How far a classifier's probabilities can be believed, and the temperatures that make them believable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from moslim.preferences import PreferenceSet

BINS = 15
"""Number of bins of the calibration errors."""
FEWEST = 30
"""Labelled rows below which a head keeps the temperature 1."""
_COLDEST, _HOTTEST = 0.1, 10.0
_HALVINGS = 40


@dataclass(frozen=True)
class Calibration:
    """What calibrating a classifier came to.

    Args:
        temperatures: One per head, fitted on all rows.
        measures: ``{dimension}/{ece, classwise_ece, brier, rps}/{before, after}``, on questions that their temperature
            has not seen; of heads with enough rows for both.
    """

    temperatures: list[float]
    measures: dict[str, Tensor]


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: bins of as many rows each, by confidence, up to ties.

    Args:
        confidence: ``[N]`` mean confidence in each bin that has rows.
        outcome: ``[N]`` how often it came true there.
        share: ``[N]`` the bin's share of the rows.
    """

    confidence: Tensor
    outcome: Tensor
    share: Tensor

    @property
    def error(self) -> Tensor:
        """Calibration error: mean distance of confidence and outcome (Naeini et al. 2015), a scalar."""
        return (self.share * (self.outcome - self.confidence).abs()).sum()


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> Reliability:
    """Compares how sure predictions were with how often they came true.

    Args:
        confidence: ``[N]`` probabilities.
        outcome: ``[N]`` whether it came true, or the share of raters who say so.
        bins: Number of bins, of equal mass. Rows with the same confidence share a bin.
    """
    edges = confidence.quantile(torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device))
    place = torch.bucketize(confidence.contiguous(), edges[1:-1])
    sums = confidence.new_zeros(3, bins).index_add_(
        1, place, torch.stack([confidence, outcome.to(confidence.dtype), torch.ones_like(confidence)])
    )
    sums = sums[:, sums[2] > 0]
    return Reliability(sums[0] / sums[2], sums[1] / sums[2], sums[2] / len(confidence))


def top_reliability(probs: Tensor, targets: Tensor, bins: int = BINS) -> Reliability:
    """Reliability of the most probable level; its ``error`` is the ECE (Guo et al., arXiv 1706.04599).

    Args:
        probs: ``[N, K]``, one head.
        targets: ``[N, K]``, share of the raters that gave each level.
        bins: Number of bins.
    """
    confidence, level = probs.max(-1)
    return reliability(confidence, targets.gather(-1, level[:, None])[:, 0], bins)


def level_reliability(probs: Tensor, targets: Tensor, level: int, bins: int = BINS) -> Reliability:
    """Reliability of one level, which is what a mapping function reads; its ``error`` is the classwise ECE.

    Args:
        probs: ``[N, K]``, one head.
        targets: ``[N, K]``, share of the raters that gave each level.
        level: The level.
        bins: Number of bins.
    """
    return reliability(probs[:, level].contiguous(), targets[:, level], bins)


def brier_score(probs: Tensor, targets: Tensor) -> Tensor:
    """``sum_k (p_k - target_k)^2``, mean over rows (Brier 1950), of ``[N, K]`` each."""
    return (probs - targets).square().sum(-1).mean()


def ranked_probability_score(probs: Tensor, targets: Tensor) -> Tensor:
    """``sum_k (P(y <= k) - target(y <= k))^2``, mean over rows (Epstein 1969), of ``[N, K]`` each.

    The proper score that knows the order of levels: probability on a level further away costs more.
    """
    return (probs.cumsum(-1) - targets.cumsum(-1)).square().sum(-1).mean()


def fit_temperatures(logits: Tensor, targets: Tensor, fewest: int = FEWEST) -> Tensor:
    """Temperature scaling (Guo et al., arXiv 1706.04599): the ``T`` per head with the least NLL of ``softmax(z / T)``.

    NLL is convex in ``1 / T``, so the sign of its slope tells on which side the least lies, and bisection finds it.

    Args:
        logits: ``[N, D, K]``, ``-inf`` on levels that a dimension lacks.
        targets: ``[N, D, K]``, share of the raters that gave each level; all 0 where not labelled.
        fewest: Labelled rows that a head must have.

    Returns:
        ``[D]`` float64 between 0.1 and 10; 1 for heads with fewer labels.
    """
    logits, targets = logits.double(), targets.double()
    labelled = targets.sum(-1, keepdim=True)
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    low = logits.new_full((logits.shape[1],), _COLDEST).log()
    high = torch.full_like(low, _HOTTEST).log()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        probs = (logits / middle.exp()[:, None]).softmax(-1)
        slope = ((probs * labelled - targets) * finite).sum((0, 2))  # of the NLL, over 1 / T
        low, high = middle.where(slope > 0, low), high.where(slope > 0, middle)
    return ((low + high) / 2).exp().where(label_counts(targets) >= fewest, 1.0)


def label_counts(targets: Tensor) -> Tensor:
    """Labelled rows ``[D]`` of each head, from targets ``[N, D, K]``."""
    return (targets > 0).any(-1).sum(0)


def calibration_measures(probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """ECE, its mean over the levels, Brier score and ranked probability score of one head, from ``[N, K]`` each."""
    by_level = [level_reliability(probs, targets, level).error for level in range(probs.shape[1])]
    return {
        "ece": top_reliability(probs, targets).error,
        "classwise_ece": torch.stack(by_level).mean(),
        "brier": brier_score(probs, targets),
        "rps": ranked_probability_score(probs, targets),
    }


def calibrate(logits: Tensor, targets: Tensor, questions: Tensor, preferences: PreferenceSet) -> Calibration:
    """Fits the temperatures, and measures honestly what they are worth.

    The measures are taken on one half of the questions, with temperatures fitted on the other.

    Args:
        logits: ``[N, D, K]`` at temperature 1, ``-inf`` on levels that a dimension lacks.
        targets: ``[N, D, K]``, share of the raters that gave each level; all 0 where not labelled.
        questions: ``[N]`` int64, the same for rows of the same question, and in random order: a hash.
        preferences: The ``D`` dimensions.
    """
    few = [name for name, n in zip(preferences.names, label_counts(targets), strict=True) if n < FEWEST]
    if few:
        rank_zero_warn(
            f"fewer than {FEWEST} validation rows are labelled for {', '.join(few)}: not calibrated, these keep the "
            "temperature 1; give more validation rows"
        )
    fitted = fit_temperatures(logits, targets)
    wild = [
        name
        for name, temperature in zip(preferences.names, fitted.tolist(), strict=True)
        if not 1.001 * _COLDEST < temperature < 0.999 * _HOTTEST
    ]
    if wild:
        rank_zero_warn(
            f"the temperature of {', '.join(wild)} is at its bound: on validation rows these heads know next to "
            "nothing, or everything"
        )
    held_out = torch.unique(questions, return_inverse=True)[1] % 2 == 1
    trial = fit_temperatures(logits[~held_out], targets[~held_out])
    enough = label_counts(targets[~held_out]) >= FEWEST
    logits_there, targets_there = logits[held_out].double(), targets[held_out].double()
    measures: dict[str, Tensor] = {}
    for stage, temperatures in {"before": torch.ones_like(trial), "after": trial}.items():
        probs = (logits_there / temperatures[:, None]).softmax(-1)
        for d, (name, size) in enumerate(zip(preferences.names, preferences.sizes, strict=True)):
            rows = (targets_there[:, d] > 0).any(-1)
            if enough[d] and rows.any():
                found = calibration_measures(probs[rows, d, :size], targets_there[rows, d, :size])
                measures |= {f"{name}/{key}/{stage}": value.float() for key, value in found.items()}
    return Calibration(fitted.tolist(), measures)
