"""Learning from, and agreeing with, which of two answers people chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from moslim.precision import full_precision, widened
from moslim.preferences import PreferenceSet


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
    """How often the chosen completion has the higher expected level, over an epoch; a tie counts half.

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
