"""Base class of mapping functions, which turn level probabilities and requested levels into rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moslim.ops.numerics import full_precision
from moslim.plugin import Plugin
from moslim.preferences import INACTIVE, Dimension, PreferenceSet
from moslim.utils.errors import UsageError


@dataclass
class MappedReward:
    """Rewards of ``B`` completions.

    Args:
        total: ``[B]``, scalar rewards for the policy optimizer.
        per_dimension: ``[B, D]``, NaN on dimensions that do not count for the completion, usually those without a
            requested level.
        weights: ``[B, D]``, weights of the dimensions; meaningless where ``per_dimension`` is NaN.
    """

    total: Tensor
    per_dimension: Tensor
    weights: Tensor


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Computes ``sum_d w_d v_d / sum_d w_d`` over the values that are not NaN.

    Args:
        values: ``[B, D]``, NaN where inactive.
        weights: ``[B, D]``.

    Returns:
        ``[B]``, 0 for rows that are all NaN.
    """
    inactive = values.isnan() | (weights == 0)
    weights = weights.to(values.dtype) * ~inactive
    return (values.masked_fill(inactive, 0.0) * weights).sum(-1) / weights.sum(-1).clamp(min=1e-12)


class MappingFunction(Plugin, ABC):
    """Turns the classifier's level probabilities into rewards.

    Subclass it, implement :meth:`per_dimension`, and name the subclass under ``model.mapping``. The other methods have
    defaults. A mapping is also a Lightning callback: the Trainer calls its hooks and saves its ``state_dict`` (plain
    numbers) in every checkpoint. The policy passes the completions of all processes in one batch.
    """

    role: ClassVar[str] = "mapping"
    _preferences: PreferenceSet | None = None

    def bind(self, preferences: PreferenceSet) -> None:
        """Sets the dimensions that the tensors refer to; the policy calls it when it is built.

        A mapping whose arguments name dimensions validates them here. A mapping that wraps others binds these, too.
        """
        self._preferences = preferences

    @property
    def preferences(self) -> PreferenceSet:
        """Dimensions of the ``D`` axis.

        Raises:
            RuntimeError: :meth:`bind` has not been called.
        """
        if self._preferences is None:
            raise RuntimeError(f"{type(self).__name__} does not know its dimensions: call bind(preferences) first")
        return self._preferences

    @abstractmethod
    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """Computes the reward of every completion on every dimension.

        Args:
            probs: ``[B, D, K]``, level probabilities; 0 on levels that a dimension lacks.
            targets: ``[B, D]`` int64, requested levels, -1 where none is requested.
            groups: ``[B]`` int64, equal for completions of the same prompt.

        Returns:
            ``[B, D]``. NaN, not 0, marks dimensions that do not count, usually those without a requested level.
        """

    def weights(self, targets: Tensor) -> Tensor:
        """Weights of the dimensions for each completion; all 1 by default.

        Args:
            targets: ``[B, D]`` int64, requested levels, -1 where none is requested.

        Returns:
            ``[B, D]`` float, not negative. Only the ratios within a row matter.
        """
        return torch.ones(targets.shape, device=targets.device)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Reduces the rewards of each completion to a scalar.

        The default is the weighted mean over the active dimensions, 0 where none is active. Override it for another
        reduction; see :attr:`is_mean`.

        Args:
            per_dimension: ``[B, D]``, NaN where inactive.
            weights: ``[B, D]`` from :meth:`weights`.

        Returns:
            ``[B]``.
        """
        return weighted_mean(per_dimension, weights)

    @property
    def is_mean(self) -> bool:
        """Whether the scalar is the weighted mean, so that a policy optimizer may aggregate dimensions itself.

        ``normalize_then_sum`` starts from the rewards per dimension and would silently ignore any other reduction.
        """
        return type(self).scalarize is MappingFunction.scalarize

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Updates statistics; called once per training rollout, before its rewards are computed.

        The default does nothing. No other method may update statistics.

        Args:
            probs: ``[B, D, K]``, level probabilities of the rollout.
            targets: ``[B, D]`` int64, requested levels, -1 where none is requested.
        """

    @full_precision()
    def __call__(self, probs: Tensor, targets: Tensor, groups: Tensor) -> MappedReward:
        """Computes the rewards of ``B`` completions; see :meth:`per_dimension` for the arguments.

        Raises:
            UsageError: :meth:`per_dimension` returns another shape than ``[B, D]``.
        """
        rewards, weights = self.per_dimension(probs, targets, groups), self.weights(targets)
        if rewards.shape != targets.shape:
            raise UsageError(
                f"{type(self).__name__}.per_dimension returns {list(rewards.shape)}: a reward of every answer on every "
                f"dimension is {list(targets.shape)}"
            )
        if self.is_mean:
            rewards = rewards.masked_fill(weights == 0, torch.nan)  # zero weight: inactive
        return MappedReward(self.scalarize(rewards, weights), rewards, weights)

    def sizes(self, like: Tensor) -> Tensor:
        """Numbers of levels of the dimensions, ``[D]`` int64, on the device of ``like``."""
        return torch.tensor(self.preferences.sizes, device=like.device)


class RunningLevels:
    """Running mean and variance of a value per requested level: a plain average first, then an exponential one.

    The state is keyed by the names of dimension and level, so a resumed run may reorder, add or remove dimensions.

    Args:
        decay: Decay of the exponential average per value; 0.999 averages over about 1000 values.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise UsageError(f"decay is {decay}: it must lie between 0 and 1")
        self.decay = decay
        self._seen: dict[str, list[float]] = {}  # count, mean, variance

    def update(self, preferences: PreferenceSet, values: Tensor, targets: Tensor) -> None:
        """Adds one value per completion and active dimension.

        Args:
            preferences: The ``D`` dimensions.
            values: ``[N, D]``; read only where a level is requested.
            targets: ``[N, D]`` int64, requested levels, -1 where none is requested.
        """
        values, targets = values.cpu().double(), targets.cpu()
        for d, dimension in enumerate(preferences.dimensions):
            keys = level_keys(dimension)
            for level in targets[:, d].unique().tolist():
                if level != INACTIVE:
                    self._merge(keys[level], values[targets[:, d] == level, d])

    def moments(self, preferences: PreferenceSet) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and population standard deviations, ``[D, K]`` float64 each; 0 for levels without values."""
        moments = torch.zeros(3, len(preferences), max(preferences.sizes), dtype=torch.float64)
        for d, dimension in enumerate(preferences.dimensions):
            for level, key in enumerate(level_keys(dimension)):
                moments[:, d, level] = torch.tensor(self._seen.get(key, [0.0, 0.0, 0.0]), dtype=torch.float64)
        count, mean, variance = moments
        return count, mean, variance.sqrt()

    def state_dict(self) -> dict[str, list[float]]:
        """Count, mean and variance by ``dimension/level``."""
        return {key: list(values) for key, values in self._seen.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self._seen = {key: list(values) for key, values in state.items()}

    def _merge(self, key: str, values: Tensor) -> None:
        count, mean, variance = self._seen.get(key, [0.0, 0.0, 0.0])
        n = len(values)
        share = max(1 - self.decay**n, n / (count + n))
        shift = values.mean().item() - mean
        spread = values.var(correction=0).item()
        variance = (1 - share) * variance + share * spread + share * (1 - share) * shift**2
        self._seen[key] = [count + n, mean + share * shift, variance]


def level_keys(dimension: Dimension) -> list[str]:
    """Keys of a dimension's levels in states and logs: ``dimension/level``, lowest first."""
    return [f"{dimension.name}/{level}" for level in dimension.levels]
