"""Running statistics of every level that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.preferences import INACTIVE, Dimension, PreferenceSet


def level_keys(dimension: Dimension) -> list[str]:
    """Names of a dimension's levels for states and logs: ``dimension/level``, lowest first."""
    return [f"{dimension.name}/{level}" for level in dimension.levels]


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
