"""Losses and metrics of the reward classifier on rows with levels and on comparisons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from moslim.ops.numerics import full_precision, widened
from moslim.preferences import PreferenceSet
from moslim.reward.heads import LINKS, LinkName, lacking
from moslim.utils.errors import UsageError


@dataclass
class BradleyTerry:
    """``-log sigmoid(scale * (E[level] of the chosen completion - E[level] of the rejected - margin_scale * margin))``.

    Averaged over the dimensions that a comparison speaks about. A preference term beside the one on attributes is the
    idea of SMORM (arXiv 2507.07375), a margin from the raters' disagreement that of "Beyond the Binary" (arXiv
    2412.03822).

    Args:
        weight: Weight of the term beside the loss on levels.
        scale: How sure a choice is where the answers are one level apart.
        margin_scale: What margins are multiplied by; 0 = all comparisons count alike.
    """

    weight: float = 1.0
    scale: float = 1.0
    margin_scale: float = 1.0

    @full_precision()
    def __call__(
        self, score_margins: Tensor, comparison_mask: Tensor, margins: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """Returns the mean over the comparisons, without the weight; 0 where there are none.

        Args:
            score_margins: ``[P, D]``, expected level of the chosen completion less that of the rejected.
            comparison_mask: ``[P, D]`` bool, the dimensions that each comparison speaks about.
            margins: ``[P]``, least score margin wanted, in levels.
            count: What to divide the sum by; None = the number of comparisons that speak about any dimension.
        """
        score_margins = widened(score_margins)
        wanted = self.margin_scale * margins[:, None].to(score_margins.dtype)
        cells = -F.logsigmoid(self.scale * (score_margins - wanted))
        each = (cells * comparison_mask).sum(1) / comparison_mask.sum(1).clamp(min=1)
        count = num_comparisons(comparison_mask) if count is None else count
        return each.sum() / count.where(count > 0, 1)


def num_comparisons(comparison_mask: Tensor) -> Tensor:
    """Number of comparisons, of those in ``[P, D]`` bool, that speak about any dimension; a scalar."""
    return comparison_mask.any(1).sum()


def credit(score_margins: Tensor) -> Tensor:
    """1 where the chosen completion has the higher expected level, 0 where it has the lower one, 1/2 for a tie."""
    return (widened(score_margins.detach()).sign() + 1) / 2


class PairMetrics(Metric):
    """Share of comparisons whose chosen completion has the higher expected level, per epoch; a tie counts half.

    Args:
        preferences: The dimensions.
    """

    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self, preferences: PreferenceSet) -> None:
        super().__init__()
        self.preferences = preferences
        self.add_state("right", torch.zeros(len(preferences), dtype=torch.float32), "sum")
        self.add_state("count", torch.zeros(len(preferences), dtype=torch.float32), "sum")

    def update(self, score_margins: Tensor, comparison_mask: Tensor) -> None:
        """Counts comparisons: margins in expected level and what they speak about, both ``[P, D]``."""
        self.right += (credit(score_margins) * comparison_mask).sum(0)
        self.count += comparison_mask.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """``pairs/accuracy`` over all dimensions, ``pairs/{dimension}/accuracy``; what was not compared is left out."""
        if not self.count.any():
            return {}
        shares = zip(self.preferences.names, self.right, self.count, strict=True)
        each = {f"pairs/{name}/accuracy": right / count for name, right, count in shares if count}
        return {"pairs/accuracy": self.right.sum() / self.count.sum(), **each}


MISSING = -1
"""Entry of a level tensor where a row carries no label for a dimension."""


class LossCounts(NamedTuple):
    """Denominators of the averages in a classifier's loss, over a batch or over an optimizer step.

    Args:
        labels: ``[D]``, sum of :meth:`LevelLoss.counts` for each head.
        comparisons: Number of comparisons, a scalar.
        comparison_cells: Number of dimensions that the comparisons speak about, a scalar.
    """

    labels: Tensor
    comparisons: Tensor
    comparison_cells: Tensor

    def stacked(self) -> Tensor:
        """``[D + 2]``, in the type of ``labels``."""
        return torch.cat([self.labels, torch.stack([self.comparisons, self.comparison_cells]).to(self.labels.dtype)])

    @classmethod
    def from_stacked(cls, counts: Tensor) -> Self:
        """Inverse of :meth:`stacked`."""
        return cls(counts[:-2], counts[-2], counts[-1])


class LevelLoss(ABC):
    """Loss over the heads. Subclass it, write :meth:`cells`, and name the subclass under ``model.loss``.

    ``sum_i w_i * sum_b cell_bi / sum_b count_bi``, with a count of 1 where a label is given: every head is averaged
    over its own labels, so that a rarely labelled one is not drowned.

    A target is the share of the raters that gave each level: one 1 where there is a single label, all 0 where the
    dimension is not labelled.

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
    """

    link: ClassVar[LinkName] = "softmax"
    """Link of the heads (:mod:`moslim.reward.heads`), which sets their width."""

    def __init__(self, weights: list[float] | None = None) -> None:
        self.weights = weights

    @abstractmethod
    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Loss of every row on every head.

        Args:
            scores: ``[B, D, S]``, the heads' raw outputs. With the link ``softmax`` these are logits ``[B, D, K]``, and
                ``-inf`` on levels that a dimension lacks.
            targets: ``[B, D, K]``, same type as ``scores``.
            sizes: Number of levels of each of the ``D`` dimensions.

        Returns:
            ``[B, D]``, finite everywhere; what it says where nothing is labelled is left out.
        """

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Weight of each row in the averages of the heads.

        Args:
            targets: ``[B, D, K]``.
            sizes: Number of levels of each of the ``D`` dimensions.

        Returns:
            ``[B, D]`` float32 or finer: 1 where labelled, else 0, unless a subclass counts otherwise.
        """
        return widened(targets).sum(-1)

    @full_precision()
    def __call__(
        self, scores: Tensor, targets: Tensor, sizes: Sequence[int], counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and its parts ``[D]``; a batch without any label gives 0, with a gradient of 0.

        Args:
            scores: ``[B, D, S]``, the heads' raw outputs.
            targets: ``[B, D, K]``.
            sizes: Number of levels of each of the ``D`` dimensions.
            counts: ``[D]``, what to divide each head's sum by; None = the sum of :meth:`counts` over this batch.

        Raises:
            UsageError: There is not one weight per head.
        """
        _check_length("weights", self.weights, len(sizes), "dimensions")
        scores = widened(scores)
        targets = targets.to(scores.dtype)  # under bf16-true, inputs come rounded
        labelled = (targets > 0).any(-1)
        cells = self.cells(scores, targets, sizes).where(labelled, 0.0)
        if counts is None:
            counts = self.counts(targets, sizes).sum(0)
        heads = cells.sum(0) / counts.where(counts > 0, 1.0)
        total = heads.sum() if self.weights is None else (heads * heads.new_tensor(self.weights)).sum()
        return total, heads.detach()


class CrossEntropy(LevelLoss):
    """``-log p(level)``, the paper's loss (MOSLIM, arXiv 2505.20336), each head with its own softmax.

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
        class_weights: Per dimension, in order, one weight per level, or [] for all 1; None = all 1. As in torch, a
            head's loss is the weighted mean.
        label_smoothing: Share of each target that is spread evenly over the dimension's levels.

    Raises:
        UsageError: ``label_smoothing`` is outside [0, 1).
    """

    def __init__(
        self,
        weights: list[float] | None = None,
        class_weights: list[list[float]] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weights)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"loss.label_smoothing is {label_smoothing}: it is a share, at least 0 and below 1")
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        if self.label_smoothing:
            levels = (~lacking(sizes, targets.device)).to(targets.dtype)
            targets = torch.lerp(targets, levels / levels.sum(-1, keepdim=True), self.label_smoothing)
        return cross_entropy(scores.log_softmax(dim=-1), self._weighted(targets, sizes))

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """The weights of the labelled levels."""
        return super().counts(self._weighted(targets, sizes), sizes)

    def _weighted(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        if self.class_weights is None:
            return targets
        _check_length("class_weights", self.class_weights, len(sizes), "dimensions")
        weights = torch.ones_like(targets[0])
        for head, (given, size) in enumerate(zip(self.class_weights, sizes, strict=True)):
            if given:
                _check_length(f"class_weights[{head}]", given, size, "levels")
                weights[head, :size] = weights.new_tensor(given)
        return targets * weights


class SoftOrdinal(LevelLoss):
    """Cross-entropy with targets that know the order of levels (SORD, Diaz & Marathe, CVPR 2019, eq. 1).

    The target of a label ``y`` is ``exp(-alpha * |k - y|)`` over the levels ``k``, normalised; that of several
    raters is the mean of theirs.

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
        alpha: How much less likely each level further away is; large values give plain cross-entropy.
    """

    def __init__(self, weights: list[float] | None = None, alpha: float = 2.0) -> None:
        super().__init__(weights)
        self.alpha = alpha

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        level = torch.arange(max(sizes), device=targets.device, dtype=targets.dtype)
        closeness = -self.alpha * (level[:, None] - level).abs()  # [label, level]
        absent = lacking(sizes, targets.device)[:, None]
        spread = closeness.masked_fill(absent, -torch.inf).softmax(-1)  # [D, label, level]
        return cross_entropy(scores.log_softmax(dim=-1), (targets[..., None] * spread).sum(-2))


class Corn(LevelLoss):
    """Conditional ordinal regression (CORN, Shi, Cao, Raschka 2021, arXiv 2111.08851).

    Threshold ``k`` is a binary task, "above ``k``?", learnt from rows of level ``k`` or more. By the chain rule, the
    losses of a row's tasks add up to ``-log p(level)``, for a rater's vote as for a label; what a head is averaged
    over is its number of tasks.
    """

    link = "corn"

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return cross_entropy(LINKS[self.link].logits(scores, sizes), targets)

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Number of tasks that a row takes part in: level ``y`` in ``y + 1``, but there is none above the top."""
        tasks = torch.arange(1, max(sizes) + 1, device=targets.device)
        thresholds = torch.tensor(sizes, device=targets.device) - 1
        return super().counts(targets * tasks.minimum(thresholds[:, None]), sizes)


class Regression(LevelLoss):
    """Mean squared error of one output per head, in levels: no classifier, but what one is to be compared with.

    With several raters it is the mean over their votes. HelpSteer2's attribute model is trained so (arXiv 2406.08673).
    """

    link = "regression"

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        level = LINKS[self.link].expected(scores, sizes)[..., None]
        return (targets * (level - torch.arange(targets.shape[-1], device=targets.device)).square()).sum(-1)


def cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """``-sum_k target_k * log p_k``, summed over the last axis.

    Args:
        log_probs: ``[..., K]``, ``-inf`` on levels that a dimension lacks.
        targets: ``[..., K]``, 0 there.
    """
    return -(targets * log_probs.masked_fill(targets == 0, 0.0)).sum(-1)  # 0 * -inf is no number


def _check_length(option: str, given: Sequence[object] | None, wanted: int, what: str) -> None:
    if given is not None and len(given) != wanted:
        raise UsageError(f"loss.{option} has {len(given)} entries for {wanted} {what}")
