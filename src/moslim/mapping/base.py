"""The interface of every mapping function: level probabilities and requested levels to reward."""

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
    """Reward of ``B`` answers.

    Args:
        total: ``[B]``, what the policy optimizer sees.
        per_dimension: ``[B, D]``, NaN on dimensions that do not count for the answer; as a rule those that the
            prompt did not mention.
        weights: ``[B, D]``, how much each of them counts for the answer; of no meaning where ``per_dimension`` is NaN.
    """

    total: Tensor
    per_dimension: Tensor
    weights: Tensor


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_d w_d v_d / sum_d w_d`` over what is not NaN, 0 where all is; ``[B, D]`` and ``[B, D]`` to ``[B]``."""
    absent = values.isnan() | (weights == 0)
    weights = weights.to(values.dtype) * ~absent
    return (values.masked_fill(absent, 0.0) * weights).sum(-1) / weights.sum(-1).clamp(min=1e-12)


class MappingFunction(Plugin, ABC):
    """Turns the classifier's output into rewards. Subclass it, and name the subclass under ``model.mapping``.

    Write :meth:`per_dimension`; the rest has defaults. A mapping is a Lightning callback as well: the Trainer
    calls its hooks, and what ``state_dict`` returns (plain numbers) goes into every checkpoint. The policy passes
    the answers of all processes at once.
    """

    role: ClassVar[str] = "mapping"
    _preferences: PreferenceSet | None = None

    def bind(self, preferences: PreferenceSet) -> None:
        """Tells the mapping what its tensors stand for; the policy does so when it is built.

        A mapping whose arguments name dimensions checks them here; one that holds others binds them, too.
        """
        self._preferences = preferences

    @property
    def preferences(self) -> PreferenceSet:
        """The dimensions of the ``D`` axis.

        Raises:
            RuntimeError: :meth:`bind` was not called.
        """
        if self._preferences is None:
            raise RuntimeError(f"{type(self).__name__} does not know its dimensions: call bind(preferences) first")
        return self._preferences

    @abstractmethod
    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """Reward of every answer on every dimension.

        Args:
            probs: ``[B, D, K]``, 0 on levels that a dimension lacks.
            targets: ``[B, D]`` int64, requested level, -1 where none was.
            groups: ``[B]`` int64, equal for answers to the same prompt.

        Returns:
            ``[B, D]``, NaN, never 0, where a dimension does not count: as a rule, where no level was requested.
        """

    def weights(self, targets: Tensor) -> Tensor:
        """How much each dimension counts for each answer: all alike, unless a mapping overrides this.

        Args:
            targets: ``[B, D]`` int64, requested level, -1 where none was.

        Returns:
            ``[B, D]`` float, 0 or more. Only ratios within a row matter.
        """
        return torch.ones(targets.shape, device=targets.device)

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """One reward per answer: the weighted mean over its active dimensions, 0 where none is active.

        A mapping whose scalar is something else overrides this; see :attr:`is_mean`.

        Args:
            per_dimension: ``[B, D]``, NaN where inactive.
            weights: ``[B, D]`` from :meth:`weights`.

        Returns:
            ``[B]``.
        """
        return weighted_mean(per_dimension, weights)

    @property
    def is_mean(self) -> bool:
        """Whether the scalar is the weighted mean. Only then may a policy optimizer aggregate dimensions by itself.

        ``normalize_then_sum`` starts from the rewards per dimension and would silently ignore any other scalar.
        """
        return type(self).scalarize is MappingFunction.scalarize

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Called once per training rollout, before the rewards are computed: the only place to update statistics."""

    @full_precision()
    def __call__(self, probs: Tensor, targets: Tensor, groups: Tensor) -> MappedReward:
        """Rewards of ``B`` answers; see :meth:`per_dimension` for the arguments.

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
            rewards = rewards.masked_fill(weights == 0, torch.nan)  # what has no weight does not count
        return MappedReward(self.scalarize(rewards, weights), rewards, weights)

    def sizes(self, like: Tensor) -> Tensor:
        """Number of levels of each dimension, ``[D]`` int64, on the device of ``like``."""
        return torch.tensor(self.preferences.sizes, device=like.device)


class RunningLevels:
    """Mean and variance of some value, level by level: a plain average at first, then one that forgets.

    The state is keyed by the names of dimension and level, never by their positions: a run may go on with its
    dimensions in another order, or with more or fewer of them.

    Args:
        decay: Weight that the past keeps per value; 0.999 remembers about 1000 values.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise UsageError(f"decay is {decay}: it must lie between 0 and 1")
        self.decay = decay
        self._seen: dict[str, list[float]] = {}  # count, mean, variance

    def update(self, preferences: PreferenceSet, values: Tensor, targets: Tensor) -> None:
        """Takes in one value per answer and active dimension.

        Args:
            preferences: The ``D`` dimensions.
            values: ``[N, D]``; read only where a level was requested.
            targets: ``[N, D]`` int64, -1 where none was.
        """
        values, targets = values.cpu().double(), targets.cpu()
        for d, dimension in enumerate(preferences.dimensions):
            keys = level_keys(dimension)
            for level in targets[:, d].unique().tolist():
                if level != INACTIVE:
                    self._merge(keys[level], values[targets[:, d] == level, d])

    def moments(self, preferences: PreferenceSet) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and population standard deviation, ``[D, K]`` float64 each; 0 where nothing was seen."""
        found = torch.zeros(3, len(preferences), max(preferences.sizes), dtype=torch.float64)
        for d, dimension in enumerate(preferences.dimensions):
            for level, key in enumerate(level_keys(dimension)):
                found[:, d, level] = torch.tensor(self._seen.get(key, [0.0, 0.0, 0.0]), dtype=torch.float64)
        count, mean, variance = found
        return count, mean, variance.sqrt()

    def state_dict(self) -> dict[str, list[float]]:
        """``dimension/level`` to count, mean, variance."""
        return {key: list(values) for key, values in self._seen.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Inverse of :meth:`state_dict`."""
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
    """Names of a dimension's levels for states and logs: ``dimension/level``, lowest first."""
    return [f"{dimension.name}/{level}" for level in dimension.levels]
