"""Rewards from the distance between achieved and requested levels: its mean, or that of the worst dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.preferences import PreferenceSet, expected_distance
from moslim.utils.errors import UsageError


class ExpectedDistance(MappingFunction):
    """Negative expected distance between achieved and requested level, ``-sum_k p_k |k - target|``.

    Unlike the probability of the requested level, it keeps a slope where completions are far from the request. Unlike
    the distance of the expected level, it penalises probability on both sides of the requested level.

    Args:
        normalize: Divide by ``K_d - 1``, so that dimensions with many levels do not outweigh those with few.
    """

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[-(K-1), 0]``, or ``[-1, 0]`` when normalised."""
        reward = -expected_distance(probs, targets)
        return reward / (self.sizes(probs) - 1) if self.normalize else reward


class Tchebycheff(MappingFunction):
    """Negative maximum of the weighted distances from the request over the active dimensions.

    With ``x_d = w_d E|level_d - target_d| / (K_d - 1)``, the reward is ``-max_d x_d`` (Steuer and Choo 1983). A mean
    lets an easy dimension compensate for a difficult one; the maximum does not. ``smoothing`` also rewards progress on
    dimensions close to the worst: ``-m log mean_d exp(x_d / m)`` (smooth Tchebycheff scalarisation, Lin et al. 2024,
    arXiv 2402.19078, with a mean in place of the sum, so that a fulfilled request has reward 0 for any number of
    dimensions). It lies between the negative maximum (``m`` to 0) and the negative mean (``m`` large).

    Args:
        weights: ``w_d`` by dimension name; 1 for dimensions that are not named.
        smoothing: ``m``, in units of ``x``; 0 for the exact maximum.
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
        """The (smooth) minimum over the active dimensions, 0 where none is active; ``weights`` is not used."""
        active_count = (~per_dimension.isnan()).sum(-1)
        distances = -per_dimension.nan_to_num(nan=torch.inf)
        if self.smoothing == 0:
            worst = distances.amax(-1)
        else:
            worst = self.smoothing * ((distances / self.smoothing).logsumexp(-1) - active_count.log())
        return torch.where(active_count > 0, -worst, 0.0)
