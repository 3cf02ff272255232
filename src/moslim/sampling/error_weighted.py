"""Preferences drawn more often where control is worst."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.levels import expected_distance
from moslim.preferences import Preference, PreferenceSet
from moslim.running import RunningLevels, level_keys
from moslim.sampling.uniform import Reachable


class ErrorWeighted(Reachable):
    """Like :class:`Reachable`, but dimensions and levels that the policy misses are drawn more often.

    The error of a level is the running mean, over the answers that were to have it, of the expected distance
    ``E|level - target| / (K - 1)``, as the classifier sees it; a level that was not asked for yet counts as the worst
    one. A dimension is drawn with probability ``uniform / D + (1 - uniform) error_d / sum_j error_j``, with the mean
    error of its levels, and one of its levels in the same way. How many are named is drawn as in :class:`Uniform`.

    The probabilities are set anew at the start of each epoch, see :class:`PreferenceSampler`. So an epoch must be
    short: set ``trainer.limit_train_batches`` to 20, for example.

    Args:
        active: See :class:`Uniform`.
        uniform: Part of the probability that is spread evenly, so that nothing is forgotten.
        decay: Weight that the past keeps per answer; 0.98 remembers about 50 answers of each level.
    """

    def __init__(self, active: Sequence[float] | None = None, uniform: float = 0.3, decay: float = 0.98) -> None:
        super().__init__(active)
        if not 0 < uniform <= 1:
            raise UsageError(f"sampler.uniform is {uniform}: give more than 0, at most 1")
        self.uniform = uniform
        self._errors = RunningLevels(decay)
        self._epoch: int | None = None
        self._shares: dict[str, float] = {}  # "dimension/level" -> probability among all, in this epoch

    def propose(self, preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
        """Draws different dimensions one after the other, and a level of each."""
        if not self._shares:  # no epoch was started
            return super().propose(preferences, count, generator)
        left = {d.name: [self._shares[key] for key in level_keys(d)] for d in preferences.dimensions}
        found = {}
        for _ in range(count):
            name = generator.choices(list(left), [sum(shares) for shares in left.values()])[0]
            shares = left.pop(name)
            found[name] = generator.choices(range(len(shares)), shares)[0]
        return Preference({name: found[name] for name in preferences.names if name in found})

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:
        """Sets the probabilities by the errors as they are now, unless this epoch has its own already."""
        keys = {key for dimension in preferences.dimensions for key in level_keys(dimension)}
        if epoch == self._epoch and keys <= self._shares.keys():
            return
        count, mean, _ = self._errors.moments(preferences)
        worst = mean.max().item() if count.any() else 1.0
        rows = mean.masked_fill(count == 0, worst).tolist()
        errors = [row[:size] for row, size in zip(rows, preferences.sizes, strict=True)]
        of_dimension = _shares([sum(row) / len(row) for row in errors], self.uniform)
        self._epoch, self._shares = epoch, {}
        for dimension, row, share in zip(preferences.dimensions, errors, of_dimension, strict=True):
            of_level = _shares(row, self.uniform)
            self._shares |= {key: share * part for key, part in zip(level_keys(dimension), of_level, strict=True)}

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:
        """See the base class."""
        top = torch.tensor(preferences.sizes, device=probs.device) - 1
        self._errors.update(preferences, expected_distance(probs, targets) / top, targets)

    def metrics(self) -> dict[str, float]:
        """``sampler/dimension/level``: probability that a prompt of one dimension asks for this level."""
        return {f"sampler/{key}": share for key, share in self._shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """The errors so far, and the probabilities of the epoch that runs."""
        return {"errors": self._errors.state_dict(), "epoch": self._epoch, "shares": dict(self._shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._errors.load_state_dict(state["errors"])
        self._epoch, self._shares = state["epoch"], dict(state["shares"])


def _shares(errors: Sequence[float], uniform: float) -> list[float]:
    """Probabilities proportional to the errors, mixed with ``uniform`` parts of an even spread."""
    total, even = sum(errors), 1 / len(errors)
    return [uniform * even + (1 - uniform) * (error / total if total else even) for error in errors]
