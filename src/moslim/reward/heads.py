"""Classification heads, the link from their outputs to level probabilities, and their calibration.

The link determines the number of outputs of a head: one per level, one per threshold between levels, or one. Heads are
slices of a shared linear layer or separate networks. Temperatures calibrate the probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moslim.preferences import PreferenceSet, expected_level
from moslim.training.distributed import warn
from moslim.utils.errors import UsageError

LinkName = Literal["softmax", "corn", "regression"]


class Link(ABC):
    """Function from the raw scores of the heads ``[B, D, S]`` to level probabilities.

    ``S`` is the largest number of outputs of a head; the scores of narrower heads are padded with ``-inf``.
    """

    @abstractmethod
    def width(self, levels: int) -> int:
        """Returns the number of outputs of a head with ``levels`` levels."""

    @abstractmethod
    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns logits ``[B, D, K]``, whose softmax gives the level probabilities; ``-inf`` on absent levels.

        Args:
            scores: ``[B, D, S]``.
            sizes: Number of levels of each of the ``D`` heads.
        """

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the expected level ``[B, D]`` for scores ``[B, D, S]``."""
        return expected_level(self.logits(scores, sizes).softmax(-1))


class SoftmaxLink(Link):
    """Link of heads with one output per level: scores are logits."""

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return scores


class CornLink(Link):
    """Link of heads with one output ``z_k`` per threshold: ``sigmoid(z_k) = P(y > k | y >= k)`` (arXiv 2111.08851).

    ``P(y > k)`` is the product of ``sigmoid(z_0), ..., sigmoid(z_k)``. ``P(y = k)`` is computed as the product
    ``P(y > k-1) * sigmoid(-z_k)``, which is accurate in log space, and not as a difference.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels - 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        # An absent threshold k has z_k = -inf: P(y > k | y >= k) = 0.
        log_at_least = F.pad(F.logsigmoid(scores).cumsum(-1), (1, 0))  # log P(y >= k)
        log_not_above = F.pad(F.logsigmoid(-scores), (0, 1))  # log P(y = k | y >= k)
        return log_at_least + log_not_above


class RegressionLink(Link):
    """Link of heads with a single output: the level, relative to the middle of the scale.

    The probability is on the two levels next to the output, and its expectation is the output, clamped to the scale.
    Other levels have a probability of 1e-7, so that logits are finite.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        highest = scores.new_tensor(sizes) - 1
        level = self.expected(scores, sizes).clamp(min=0).minimum(highest)[..., None]
        distance = (level - torch.arange(max(sizes), device=scores.device)).abs()
        return (1 - distance).clamp(min=1e-7).log().masked_fill(absent_levels(sizes, scores.device), -torch.inf)

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the level without clamping, since the gradient would vanish outside the scale."""
        return scores[..., 0] + (scores.new_tensor(sizes) - 1) / 2


LINKS: Mapping[LinkName, Link] = {"softmax": SoftmaxLink(), "corn": CornLink(), "regression": RegressionLink()}


def absent_levels(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns a bool mask ``[D, K]`` that is True for levels beyond a dimension's number of levels."""
    return torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]


class HeadLinear(nn.Linear):
    """Linear layer with torch's initialisation; the 0.02 of transformers is too small for narrow layers."""


@dataclass(frozen=True)
class HeadShape:
    """Shape of the network of one head.

    Args:
        outputs: Number of outputs.
        hidden: Width of the hidden layer; None = a single linear layer.
        dropout: Dropout on the hidden layer.
    """

    outputs: int
    hidden: int | None = None
    dropout: float = 0.0


class SeparateHeads(nn.ModuleDict):
    """One network per dimension, registered under the dimension's name.

    Args:
        inputs: Width ``H`` of the features.
        shapes: Shape of each network, by dimension name.

    Raises:
        UsageError: The name of a dimension cannot be the name of a module.
    """

    def __init__(self, inputs: int, shapes: Mapping[str, HeadShape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            try:
                self[name] = _network(inputs, shape)
            except KeyError as error:
                raise UsageError(
                    f"the name of dimension '{name}' cannot be the name of a torch module ({error}): rename the "
                    "dimension in `preferences`"
                ) from None

    def forward(self, features: Tensor) -> Tensor:
        """Returns the outputs of all heads for features ``[B, H]``, concatenated on the last axis."""
        return torch.cat([head(features) for head in self.values()], dim=-1)


def _network(inputs: int, shape: HeadShape) -> nn.Module:
    if shape.hidden is None:
        return HeadLinear(inputs, shape.outputs)
    return nn.Sequential(
        HeadLinear(inputs, shape.hidden), nn.GELU(), nn.Dropout(shape.dropout), HeadLinear(shape.hidden, shape.outputs)
    )


BINS = 15
"""Number of bins of the calibration errors."""
MIN_LABELS = 30
"""Minimum number of labelled rows to fit a head's temperature; below, it is 1."""
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.1, 10.0
_BISECTION_STEPS = 40


@dataclass(frozen=True)
class Calibration:
    """Result of calibrating a classifier.

    Args:
        temperatures: One per head, fitted on all rows.
        measures: ``{dimension}/{ece, classwise_ece, brier, rps}/{before, after}``, on questions that the fit of the
            measured temperature did not use; for heads with enough rows only.
    """

    temperatures: list[float]
    measures: dict[str, Tensor]


@dataclass(frozen=True)
class Reliability:
    """Reliability diagram with bins of equal mass, except for ties.

    Args:
        confidence: ``[N]``, mean confidence in each non-empty bin.
        outcome: ``[N]``, share of correct predictions in the bin.
        share: ``[N]``, the bin's share of the rows.
    """

    confidence: Tensor
    outcome: Tensor
    share: Tensor

    @property
    def error(self) -> Tensor:
        """Expected calibration error: mean absolute difference of confidence and outcome (Naeini et al. 2015)."""
        return (self.share * (self.outcome - self.confidence).abs()).sum()


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> Reliability:
    """Computes the reliability diagram of predictions.

    Args:
        confidence: ``[N]``, predicted probabilities.
        outcome: ``[N]``, whether the prediction is correct, or the share of raters who agree with it.
        bins: Number of bins of equal mass. Rows with the same confidence share a bin.
    """
    edges = confidence.quantile(torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device))
    bin_indices = torch.bucketize(confidence.contiguous(), edges[1:-1])
    sums = confidence.new_zeros(3, bins).index_add_(
        1, bin_indices, torch.stack([confidence, outcome.to(confidence.dtype), torch.ones_like(confidence)])
    )
    sums = sums[:, sums[2] > 0]
    return Reliability(sums[0] / sums[2], sums[1] / sums[2], sums[2] / len(confidence))


def top_reliability(probs: Tensor, targets: Tensor, bins: int = BINS) -> Reliability:
    """Computes the reliability of the most probable level, whose ``error`` is the ECE (Guo et al., arXiv 1706.04599).

    Args:
        probs: ``[N, K]``, one head.
        targets: ``[N, K]``, share of the raters that gave each level.
        bins: Number of bins.
    """
    confidence, level = probs.max(-1)
    return reliability(confidence, targets.gather(-1, level[:, None])[:, 0], bins)


def level_reliability(probs: Tensor, targets: Tensor, level: int, bins: int = BINS) -> Reliability:
    """Computes the reliability of one level's probability, whose ``error`` is the level's classwise ECE.

    Mapping functions read these probabilities.

    Args:
        probs: ``[N, K]``, one head.
        targets: ``[N, K]``, share of the raters that gave each level.
        level: Index of the level.
        bins: Number of bins.
    """
    return reliability(probs[:, level].contiguous(), targets[:, level], bins)


def brier_score(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean over rows of ``sum_k (p_k - target_k)^2`` (Brier 1950); both arguments are ``[N, K]``."""
    return (probs - targets).square().sum(-1).mean()


def ranked_probability_score(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean over rows of ``sum_k (P(y <= k) - target(y <= k))^2`` (Epstein 1969).

    This proper score respects the order of levels: probability on a more distant level costs more. Both arguments are
    ``[N, K]``.
    """
    return (probs.cumsum(-1) - targets.cumsum(-1)).square().sum(-1).mean()


def fit_temperatures(logits: Tensor, targets: Tensor, min_labels: int = MIN_LABELS) -> Tensor:
    """Fits the temperature ``T`` of each head that minimises the NLL of ``softmax(z / T)`` (arXiv 1706.04599).

    The NLL is convex in ``1 / T``, so bisection on the sign of its slope finds the minimum.

    Args:
        logits: ``[N, D, K]``, ``-inf`` on absent levels.
        targets: ``[N, D, K]``, share of the raters that gave each level; all 0 without a label.
        min_labels: Minimum number of labelled rows of a head.

    Returns:
        ``[D]`` float64 between 0.1 and 10; 1 for heads with fewer labels.
    """
    logits, targets = logits.double(), targets.double()
    labelled = targets.sum(-1, keepdim=True)
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    low = logits.new_full((logits.shape[1],), _MIN_TEMPERATURE).log()
    high = torch.full_like(low, _MAX_TEMPERATURE).log()
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        probs = (logits / middle.exp()[:, None]).softmax(-1)
        slope = ((probs * labelled - targets) * finite).sum((0, 2))  # d NLL / d (1 / T)
        low, high = middle.where(slope > 0, low), high.where(slope > 0, middle)
    return ((low + high) / 2).exp().where(label_counts(targets) >= min_labels, 1.0)


def label_counts(targets: Tensor) -> Tensor:
    """Returns the number of labelled rows of each head, ``[D]``, for targets ``[N, D, K]``."""
    return (targets > 0).any(-1).sum(0)


def calibration_measures(probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Returns ECE, classwise ECE (mean over levels), Brier and ranked probability score of one head, ``[N, K]``."""
    by_level = [level_reliability(probs, targets, level).error for level in range(probs.shape[1])]
    return {
        "ece": top_reliability(probs, targets).error,
        "classwise_ece": torch.stack(by_level).mean(),
        "brier": brier_score(probs, targets),
        "rps": ranked_probability_score(probs, targets),
    }


def calibrate(logits: Tensor, targets: Tensor, questions: Tensor, preferences: PreferenceSet) -> Calibration:
    """Fits the temperatures and measures the calibration before and after.

    Temperatures are fitted on all rows. The measures are computed on one half of the questions, with temperatures
    fitted on the other half.

    Args:
        logits: ``[N, D, K]`` at temperature 1, ``-inf`` on absent levels.
        targets: ``[N, D, K]``, share of the raters that gave each level; all 0 without a label.
        questions: ``[N]`` int64, a hash of each row's question.
        preferences: The ``D`` dimensions.
    """
    sparse = [name for name, n in zip(preferences.names, label_counts(targets), strict=True) if n < MIN_LABELS]
    if sparse:
        warn(
            f"fewer than {MIN_LABELS} validation rows are labelled for {', '.join(sparse)}: these are not calibrated "
            "and keep the temperature 1; give more validation rows"
        )
    fitted = fit_temperatures(logits, targets)
    at_bound = [
        name
        for name, temperature in zip(preferences.names, fitted.tolist(), strict=True)
        if not 1.001 * _MIN_TEMPERATURE < temperature < 0.999 * _MAX_TEMPERATURE
    ]
    if at_bound:
        warn(
            f"the temperature of {', '.join(at_bound)} is at its bound, {_MIN_TEMPERATURE:g} or {_MAX_TEMPERATURE:g}: "
            "on the validation rows these heads predict almost nothing, or everything; check the labels and the "
            "validation accuracy"
        )
    held_out = torch.unique(questions, return_inverse=True)[1] % 2 == 1
    half_fitted = fit_temperatures(logits[~held_out], targets[~held_out])
    enough = label_counts(targets[~held_out]) >= MIN_LABELS
    held_out_logits, held_out_targets = logits[held_out].double(), targets[held_out].double()
    measures: dict[str, Tensor] = {}
    for stage, temperatures in {"before": torch.ones_like(half_fitted), "after": half_fitted}.items():
        probs = (held_out_logits / temperatures[:, None]).softmax(-1)
        for d, (name, size) in enumerate(zip(preferences.names, preferences.sizes, strict=True)):
            rows = (held_out_targets[:, d] > 0).any(-1)
            if enough[d] and rows.any():
                head_measures = calibration_measures(probs[rows, d, :size], held_out_targets[rows, d, :size])
                measures |= {f"{name}/{key}/{stage}": value.float() for key, value in head_measures.items()}
    return Calibration(fitted.tolist(), measures)
