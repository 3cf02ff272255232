"""Classification heads, the link from their outputs to level probabilities, and their calibration.

A head has one output per level, one per threshold, or a single one. Heads are slices of one linear layer or networks of
their own. Temperatures calibrate their probabilities.
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
    """Link from the raw scores of the heads ``[B, D, S]`` to level probabilities.

    ``S`` is the largest width of a head; ``-inf`` fills up the narrower ones.
    """

    @abstractmethod
    def width(self, levels: int) -> int:
        """Number of outputs of a head with ``levels`` levels."""

    @abstractmethod
    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Logits ``[B, D, K]`` whose softmax are the level probabilities; ``-inf`` on levels that a head lacks.

        Args:
            scores: ``[B, D, S]``.
            sizes: Number of levels of each of the ``D`` heads.
        """

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """Expected level ``[B, D]`` of scores ``[B, D, S]``."""
        return expected_level(self.logits(scores, sizes).softmax(-1))


class SoftmaxLink(Link):
    """One output per level: scores are logits."""

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return scores


class CornLink(Link):
    """One output ``z_k`` per threshold: ``sigmoid(z_k) = P(y > k | y >= k)`` (CORN, arXiv 2111.08851).

    ``P(y > k)`` is the product of ``sigmoid(z_0) .. sigmoid(z_k)``, and ``P(y = k)`` the difference of two successive
    ones, ``P(y > k-1) * sigmoid(-z_k)``: as a product, it is exact in logarithms.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return levels - 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        # A threshold that a head lacks has z = -inf: no level is above it, and its level itself is certain.
        reached = F.pad(F.logsigmoid(scores).cumsum(-1), (1, 0))
        stopped = F.pad(F.logsigmoid(-scores), (0, 1))
        return reached + stopped


class RegressionLink(Link):
    """A single output: the level, as distance from the middle of the scale, so that 0 is a neutral start.

    Its distribution is on the two levels next to it and has the output, clamped to the scale, as its expectation. Other
    levels keep a probability of 1e-7, so that logits are finite.
    """

    def width(self, levels: int) -> int:
        """See the base class."""
        return 1

    def logits(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class; these logits are log-probabilities."""
        highest = scores.new_tensor(sizes) - 1
        level = self.expected(scores, sizes).clamp(min=0).minimum(highest)[..., None]
        distance = (level - torch.arange(max(sizes), device=scores.device)).abs()
        return (1 - distance).clamp(min=1e-7).log().masked_fill(lacking(sizes, scores.device), -torch.inf)

    def expected(self, scores: Tensor, sizes: Sequence[int]) -> Tensor:
        """The level as it was put out; not clamped, as the gradient would vanish beyond the ends of the scale."""
        return scores[..., 0] + (scores.new_tensor(sizes) - 1) / 2


LINKS: Mapping[LinkName, Link] = {"softmax": SoftmaxLink(), "corn": CornLink(), "regression": RegressionLink()}


def lacking(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns ``[D, K]`` bool: True where a dimension has no such level."""
    return torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]


class HeadLinear(nn.Linear):
    """A layer whose weights are drawn by its width, as in torch; transformers' 0.02 is too little for a narrow one."""


@dataclass(frozen=True)
class HeadShape:
    """The network of one head.

    Args:
        outputs: Number of outputs.
        hidden: Width of its hidden layer; None = a single linear layer.
        dropout: Dropout on the hidden layer.
    """

    outputs: int
    hidden: int | None = None
    dropout: float = 0.0


class OwnHeads(nn.ModuleDict):
    """One network per dimension, under the dimension's name.

    Args:
        inputs: Width ``H`` of the features.
        shapes: The network's shape, by dimension name.

    Raises:
        UsageError: A dimension has a name that a module cannot have.
    """

    def __init__(self, inputs: int, shapes: Mapping[str, HeadShape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            try:
                self[name] = _network(inputs, shape)
            except KeyError as error:
                raise UsageError(f"the head of dimension '{name}' cannot bear its name, rename it: {error}") from None

    def forward(self, features: Tensor) -> Tensor:
        """Returns the outputs of all heads, side by side, of features ``[B, H]``."""
        return torch.cat([head(features) for head in self.values()], dim=-1)


def _network(inputs: int, shape: HeadShape) -> nn.Module:
    if shape.hidden is None:
        return HeadLinear(inputs, shape.outputs)
    return nn.Sequential(
        HeadLinear(inputs, shape.hidden), nn.GELU(), nn.Dropout(shape.dropout), HeadLinear(shape.hidden, shape.outputs)
    )


BINS = 15
"""Number of bins of the calibration errors."""
FEWEST = 30
"""Labelled rows below which a head keeps the temperature 1."""
_COLDEST, _HOTTEST = 0.1, 10.0
_HALVINGS = 40


@dataclass(frozen=True)
class Calibration:
    """Result of calibrating a classifier.

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
        warn(
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
        warn(
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
