"""Rewards by the distance of achieved from requested levels: expected, or of the worst dimension.

Reward by how far the achieved level is from the requested one.

Reward by the dimension that misses its request the most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.preferences import PreferenceSet, expected_distance
from moslim.utils.errors import UsageError


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


class Tchebycheff(MappingFunction):
    """Minus the largest weighted distance from the request over the active dimensions.

    With ``x_d = w_d E|level_d - target_d| / (K_d - 1)`` the reward is ``-max_d x_d`` (Steuer and Choo 1983). Where a
    mean lets a dimension that is easy make up for one that is not, here only the worst one counts, and progress on
    it. ``smoothing`` spreads the signal over those close to the worst: ``-m log mean_d exp(x_d / m)`` (smooth
    Tchebycheff scalarisation, Lin et al. 2024, arXiv 2402.19078, with a mean for their sum, so that a fulfilled
    request is worth 0 however many dimensions it names). It lies between minus the maximum (``m`` to 0) and minus the
    mean (``m`` large).

    Args:
        weights: ``w_d`` by dimension name; 1 for those not named.
        smoothing: ``m``, in units of ``x``; 0 takes the maximum itself.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, smoothing: float = 0.1) -> None:
        if smoothing < 0:
            raise UsageError(f"smoothing is {smoothing}: give 0 or more")
        self.factors = dict(weights or {})
        self.smoothing = smoothing
        for name, weight in self.factors.items():
            if weight <= 0:
                raise UsageError(f"the weight of '{name}' is {weight}: give a positive number")

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: ``weights`` names an unknown dimension.
        """
        super().bind(preferences)
        for name in self.factors:
            preferences[name]

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``-x_d``."""
        factors = probs.new_tensor([self.factors.get(name, 1.0) for name in self.preferences.names])
        return -factors * expected_distance(probs, targets) / (self.sizes(probs) - 1)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """The (smooth) minimum over active dimensions, 0 where none is active; ``w_d`` is in them already."""
        count = (~per_dimension.isnan()).sum(-1)
        missed = -per_dimension.nan_to_num(nan=torch.inf)
        if self.smoothing == 0:
            worst = missed.amax(-1)
        else:
            worst = self.smoothing * ((missed / self.smoothing).logsumexp(-1) - count.log())
        return torch.where(count > 0, -worst, 0.0)
