"""What the reward classifier minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

MISSING = -1
"""Entry of a level tensor where a row carries no label for a dimension."""


class LevelLoss(ABC):
    """Loss over the heads. Subclass it, write :meth:`cells`, and name the subclass under ``model.loss``.

    ``sum_i w_i * sum_b m_bi * cell_bi / max(1, sum_b m_bi)``, with ``m`` = 1 where a label is given: every head is
    averaged over its own labels, so that a rarely labelled one is not drowned.

    Args:
        weights: One per head, in the order of the dimensions; None = all 1.
    """

    def __init__(self, weights: list[float] | None = None) -> None:
        self.weights = weights

    @abstractmethod
    def cells(self, logits: Tensor, levels: Tensor, sizes: Sequence[int]) -> Tensor:
        """Loss of every row on every head, unmasked.

        Args:
            logits: ``[B, D, K]``, ``-inf`` on levels that a dimension lacks.
            levels: ``[B, D]`` int64; 0 stands in where the label is missing.
            sizes: Number of levels of each of the ``D`` dimensions.

        Returns:
            ``[B, D]``, finite everywhere.
        """

    def __call__(
        self, logits: Tensor, levels: Tensor, sizes: Sequence[int], counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and its parts; a batch without any label gives 0, with a gradient of 0.

        Args:
            logits: ``[B, D, K]``, ``-inf`` on levels that a dimension lacks.
            levels: ``[B, D]`` int64, -1 = not labelled.
            sizes: Number of levels of each of the ``D`` dimensions.
            counts: ``[D]``, what to divide each head's sum by; None = the number of its labels in this batch.

        Raises:
            ValueError: There is not one weight per head.
        """
        if self.weights is not None and len(self.weights) != len(sizes):
            raise ValueError(f"loss.weights has {len(self.weights)} entries for {len(sizes)} dimensions")
        labelled = levels != MISSING
        cells = self.cells(logits, levels.clamp(min=0), sizes).where(labelled, 0.0)
        if counts is None:
            counts = labelled.sum(0).clamp(min=1)
        heads = cells.sum(0) / counts
        total = heads.sum() if self.weights is None else (heads * heads.new_tensor(self.weights)).sum()
        return total, heads.detach()


class CrossEntropy(LevelLoss):
    """``-log p(level)``, the paper's loss (MOSLIM, arXiv 2505.20336), each head with its own softmax."""

    def cells(self, logits: Tensor, levels: Tensor, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return -torch.log_softmax(logits, dim=-1).gather(-1, levels[..., None])[..., 0]
