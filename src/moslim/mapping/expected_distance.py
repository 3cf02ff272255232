"""Reward by how far the achieved level is from the requested one."""

from __future__ import annotations

from torch import Tensor

from moslim.levels import expected_distance
from moslim.mapping.base import MappingFunction


class ExpectedDistance(MappingFunction):
    """Minus the expected distance between achieved and requested level, ``-sum_k p_k |k - target|``.

    Unlike the probability of the requested level it still has a slope where the request is far from what the
    policy writes; unlike the distance of the expected level, a head that bets on both sides does not satisfy it.

    Args:
        normalize: Divide by the number of levels minus one, so that dimensions with many levels do not outweigh
            those with few.
    """

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[-(K-1), 0]``, or ``[-1, 0]`` when normalised."""
        reward = -expected_distance(probs, targets)
        return reward / (self.sizes(probs) - 1) if self.normalize else reward
