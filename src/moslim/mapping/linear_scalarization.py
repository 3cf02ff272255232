"""Linear scalarisation: a sum of expected levels, weighted by the requested levels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.preferences import INACTIVE, expected_level
from moslim.utils.errors import UsageError

Weights = Literal["share", "direction"]


class LinearScalarization(MappingFunction):
    """Weighted sum of expected levels, ``sum_d w_d e_d`` with ``e_d = E[level_d] / (K_d - 1)`` in 0..1.

    MORLHF, Rewarded Soups (arXiv 2306.04488) and RiC (arXiv 2402.10207) steer by such weights. Here they follow from
    the requested levels ``t_d = target_d / (K_d - 1)`` of the ``n`` active dimensions:

    - ``share``: ``w_d = t_d / sum_j t_j``. Weights are not negative and sum to 1. A request for lowest levels only has
      no weights and therefore no reward.
    - ``direction``: ``w_d = (2 t_d - 1) / n``, from ``-1/n`` (as low as possible) to ``1/n`` (as high as possible).

    The optimum lies at an end of every dimension, so intermediate levels cannot be requested. This mapping is a
    baseline.

    Args:
        weights: ``share`` or ``direction``, as above.
    """

    def __init__(self, weights: Weights = "share") -> None:
        if weights not in ("share", "direction"):
            raise UsageError(f"weights is '{weights}': give share or direction")
        self.weighting = weights

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d e_d``."""
        top = self.sizes(probs) - 1
        active = targets != INACTIVE
        requested = (targets / top).to(probs.dtype) * active
        if self.weighting == "share":
            total = requested.sum(-1, keepdim=True)
            active &= total > 0
            weights = requested / total.masked_fill(total == 0, 1)
        else:
            weights = (2 * requested - 1) / active.sum(-1, keepdim=True).clamp(min=1)
        return (weights * expected_level(probs) / top).masked_fill(~active, float("nan"))

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Sum of the weighted levels; ``weights`` is not used."""
        return per_dimension.nansum(-1)
