"""Reward by a weighted sum of expected levels, with weights read from the request."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.preferences import INACTIVE, expected_level
from moslim.utils.errors import UsageError

Weights = Literal["share", "direction"]


class LinearScalarization(MappingFunction):
    """``sum_d w_d e_d``, where ``e_d = E[level_d] / (K_d - 1)`` is the expected level on a scale of 0 to 1.

    The classical way to trade objectives off, by which MORLHF, Rewarded Soups (arXiv 2306.04488) and RiC (arXiv
    2402.10207) are steered. Here the weights come from the request: ``t_d = target_d / (K_d - 1)`` also runs from 0
    to 1, and over the ``n`` active dimensions

    - ``share``: ``w_d = t_d / sum_j t_j``. A requested level says how much its dimension matters: weights are not
      negative and add up to 1. A request of lowest levels alone has no weights, so that no reward applies to it.
    - ``direction``: ``w_d = (2 t_d - 1) / n``. From -1/n, as low as possible, to 1/n, as high as possible.

    Either way the best answer lies at an end of every dimension, so a level in between cannot be asked for. It is
    here to be compared with.

    Args:
        weights: See above.
    """

    def __init__(self, weights: Weights = "share") -> None:
        if weights not in ("share", "direction"):
            raise UsageError(f"weights is '{weights}': give share or direction")
        self.kind = weights

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d e_d``."""
        top = self.sizes(probs) - 1
        active = targets != INACTIVE
        wanted = (targets / top).to(probs.dtype) * active
        if self.kind == "share":
            total = wanted.sum(-1, keepdim=True)
            active &= total > 0
            weights = wanted / total.masked_fill(total == 0, 1)
        else:
            weights = (2 * wanted - 1) / active.sum(-1, keepdim=True).clamp(min=1)
        return (weights * expected_level(probs) / top).masked_fill(~active, float("nan"))

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Their sum: ``w_d`` is in them already."""
        return per_dimension.nansum(-1)
