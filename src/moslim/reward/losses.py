"""Losses of the reward classifier on rows with levels and on comparisons, and metrics of comparisons."""

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
from moslim.reward.heads import LINKS, LinkName, absent_levels
from moslim.utils.errors import UsageError


@dataclass
class BradleyTerry:
    """Bradley-Terry loss on comparisons, computed from expected levels.

    ``-log sigmoid(scale * (E[level | chosen] - E[level | rejected] - margin_scale * margin))``, averaged over the
    dimensions that a comparison is about. SMORM (arXiv 2507.07375) adds such a loss to one on attributes; "Beyond the
    Binary" (arXiv 2412.03822) derives margins from the raters' disagreement.

    Args:
        weight: Weight of this loss in the sum with the loss on levels.
        scale: Log-odds of the choice per level of difference.
        margin_scale: Factor of the margins; 0 = no margins.
    """

    weight: float = 1.0
    scale: float = 1.0
    margin_scale: float = 1.0

    @full_precision()
    def __call__(
        self, score_margins: Tensor, comparison_mask: Tensor, margins: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """Returns the mean loss over the comparisons, without ``weight``; 0 if there are none.

        Args:
            score_margins: ``[P, D]``, expected level of the chosen completion minus that of the rejected one.
            comparison_mask: ``[P, D]`` bool, the dimensions that each comparison is about.
            margins: ``[P]``, required score margin in levels.
            count: Denominator of the mean, a scalar; None = :func:`num_comparisons`.
        """
        score_margins = widened(score_margins)
        required = self.margin_scale * margins[:, None].to(score_margins.dtype)
        cells = -F.logsigmoid(self.scale * (score_margins - required))
        losses = (cells * comparison_mask).sum(1) / comparison_mask.sum(1).clamp(min=1)
        count = num_comparisons(comparison_mask) if count is None else count
        return losses.sum() / count.where(count > 0, 1)


def num_comparisons(comparison_mask: Tensor) -> Tensor:
    """Returns the number of comparisons in ``[P, D]`` bool that are about at least one dimension; a scalar."""
    return comparison_mask.any(1).sum()


def credit(score_margins: Tensor) -> Tensor:
    """Returns 1 where the chosen completion has the higher expected level, 0 where the lower, 1/2 for a tie."""
    return (widened(score_margins.detach()).sign() + 1) / 2


class PairMetrics(Metric):
    """Share of comparisons in an epoch whose chosen completion has the higher expected level; a tie counts 1/2.

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
        """Adds comparisons: margins in expected level, and the mask of compared dimensions, both ``[P, D]``."""
        self.right += (credit(score_margins) * comparison_mask).sum(0)
        self.count += comparison_mask.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``pairs/accuracy`` over all dimensions and ``pairs/{dimension}/accuracy`` of each compared one."""
        if not self.count.any():
            return {}
        counts = zip(self.preferences.names, self.right, self.count, strict=True)
        accuracies = {f"pairs/{name}/accuracy": right / count for name, right, count in counts if count}
        return {"pairs/accuracy": self.right.sum() / self.count.sum(), **accuracies}


MISSING = -1
"""Entry of a level tensor for a dimension without a label."""


class LossCounts(NamedTuple):
    """Denominators of the means in a classifier's loss, over a batch or an optimizer step.

    Args:
        labels: ``[D]``, sum of :meth:`LevelLoss.counts` for each head.
        comparisons: Number of comparisons, a scalar.
        comparison_cells: Number of compared dimensions, summed over the comparisons; a scalar.
    """

    labels: Tensor
    comparisons: Tensor
    comparison_cells: Tensor

    def stacked(self) -> Tensor:
        """Returns one tensor ``[D + 2]`` in the type of ``labels``."""
        return torch.cat([self.labels, torch.stack([self.comparisons, self.comparison_cells]).to(self.labels.dtype)])

    @classmethod
    def from_stacked(cls, counts: Tensor) -> Self:
        """Splits a tensor from :meth:`stacked`."""
        return cls(counts[:-2], counts[-2], counts[-1])


class LevelLoss(ABC):
    """Base class of losses on levels. A subclass implements :meth:`cells` and is named under ``model.loss``.

    The loss is ``sum_i w_i * sum_b cell_bi / sum_b count_bi`` over heads ``i`` and rows ``b``, where the count is 1 for
    a label and 0 without one. So each head averages over its own labels, and a rarely labelled head has full weight.

    A target is the share of the raters that gave each level: one-hot for a single label, all 0 without one.

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
    """

    link: ClassVar[LinkName] = "softmax"
    """Link of the heads (:mod:`moslim.reward.heads`), which determines their number of outputs."""

    def __init__(self, weights: list[float] | None = None) -> None:
        self.weights = weights

    @abstractmethod
    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the loss of each row on each head.

        Args:
            scores: ``[B, D, S]``, the heads' raw outputs. With the link ``softmax`` these are logits ``[B, D, K]``,
                ``-inf`` on absent levels.
            targets: ``[B, D, K]``, same type as ``scores``.
            sizes: Number of levels of each of the ``D`` dimensions.

        Returns:
            ``[B, D]``, finite everywhere; entries without a label are ignored.
        """

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the weight of each row in the mean of each head.

        Args:
            targets: ``[B, D, K]``.
            sizes: Number of levels of each of the ``D`` dimensions.

        Returns:
            ``[B, D]`` in float32 or higher precision: 1 with a label, else 0, unless a subclass overrides this.
        """
        return widened(targets).sum(-1)

    @full_precision()
    def __call__(
        self, scores: Tensor, targets: Tensor, sizes: Sequence[int], counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss, a scalar, and the detached loss of each head, ``[D]``; both are 0 without labels.

        Args:
            scores: ``[B, D, S]``, the heads' raw outputs.
            targets: ``[B, D, K]``.
            sizes: Number of levels of each of the ``D`` dimensions.
            counts: ``[D]``, denominator of each head's mean; None = the sum of :meth:`counts` over this batch.

        Raises:
            UsageError: The number of weights is not the number of heads.
        """
        _check_length("weights", self.weights, len(sizes), "dimensions")
        scores = widened(scores)
        targets = targets.to(scores.dtype)  # bf16-true casts inputs
        labelled = (targets > 0).any(-1)
        cells = self.cells(scores, targets, sizes).where(labelled, 0.0)
        if counts is None:
            counts = self.counts(targets, sizes).sum(0)
        heads = cells.sum(0) / counts.where(counts > 0, 1.0)
        total = heads.sum() if self.weights is None else (heads * heads.new_tensor(self.weights)).sum()
        return total, heads.detach()


class CrossEntropy(LevelLoss):
    """Cross-entropy ``-log p(level)`` with one softmax per head, the loss of MOSLIM (arXiv 2505.20336).

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
        class_weights: For each dimension, one weight per level, or [] for all 1; None = all 1. As in torch, a head's
            loss is the weighted mean.
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
            raise UsageError(f"loss.label_smoothing is {label_smoothing}: give a share of at least 0 and below 1")
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        if self.label_smoothing:
            levels = (~absent_levels(sizes, targets.device)).to(targets.dtype)
            targets = torch.lerp(targets, levels / levels.sum(-1, keepdim=True), self.label_smoothing)
        return cross_entropy(scores.log_softmax(dim=-1), self._weighted(targets, sizes))

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the class weight of each row's label."""
        return super().counts(self._weighted(targets, sizes), sizes)

    def _weighted(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        if self.class_weights is None:
            return targets
        _check_length("class_weights", self.class_weights, len(sizes), "dimensions")
        weights = torch.ones_like(targets[0])
        for head, (level_weights, size) in enumerate(zip(self.class_weights, sizes, strict=True)):
            if level_weights:
                _check_length(f"class_weights[{head}]", level_weights, size, "levels")
                weights[head, :size] = weights.new_tensor(level_weights)
        return targets * weights


class SoftOrdinal(LevelLoss):
    """Cross-entropy with soft targets that decay with the distance from the label (SORD, CVPR 2019, eq. 1).

    The target of a label ``y`` is ``exp(-alpha * |k - y|)`` over the levels ``k``, normalised. The target of several
    raters is the mean of theirs (Diaz & Marathe: Soft Labels for Ordinal Regression).

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
        alpha: Decay rate per level; large values give plain cross-entropy.
    """

    def __init__(self, weights: list[float] | None = None, alpha: float = 2.0) -> None:
        super().__init__(weights)
        self.alpha = alpha

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        level = torch.arange(max(sizes), device=targets.device, dtype=targets.dtype)
        closeness = -self.alpha * (level[:, None] - level).abs()  # [label, level]
        absent = absent_levels(sizes, targets.device)[:, None]
        spread = closeness.masked_fill(absent, -torch.inf).softmax(-1)  # [D, label, level]
        return cross_entropy(scores.log_softmax(dim=-1), (targets[..., None] * spread).sum(-2))


class Corn(LevelLoss):
    """Conditional ordinal regression (CORN, Shi, Cao, Raschka 2021, arXiv 2111.08851).

    Threshold ``k`` is a binary task, "is the level above ``k``?", learnt from rows of level ``k`` or more. By the chain
    rule, the losses of a row's tasks sum to ``-log p(level)``. A head's loss is the mean over its tasks.
    """

    link = "corn"

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return cross_entropy(LINKS[self.link].logits(scores, sizes), targets)

    def counts(self, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns the number of tasks of each row: ``y + 1`` for level ``y``, and one less for the highest level."""
        tasks = torch.arange(1, max(sizes) + 1, device=targets.device)
        thresholds = torch.tensor(sizes, device=targets.device) - 1
        return super().counts(targets * tasks.minimum(thresholds[:, None]), sizes)


class Regression(LevelLoss):
    """Mean squared error of one output per head, in levels: a regression baseline for the classifiers.

    The error is averaged over the votes of several raters. HelpSteer2's attribute model uses this loss (arXiv
    2406.08673).
    """

    link = "regression"

    def cells(self, scores: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        level = LINKS[self.link].expected(scores, sizes)[..., None]
        return (targets * (level - torch.arange(targets.shape[-1], device=targets.device)).square()).sum(-1)


def cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Returns ``-sum_k target_k * log p_k`` over the last axis, ``[...]``.

    Args:
        log_probs: ``[..., K]``, ``-inf`` on absent levels.
        targets: ``[..., K]``, 0 on absent levels.
    """
    return -(targets * log_probs.masked_fill(targets == 0, 0.0)).sum(-1)  # 0 * -inf = NaN


def _check_length(option: str, weights: Sequence[object] | None, length: int, unit: str) -> None:
    if weights is not None and len(weights) != length:
        raise UsageError(f"loss.{option} has {len(weights)} entries for {length} {unit}: give one for each")
