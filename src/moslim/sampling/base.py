"""The interface of every sampler: which preferences are asked for during training."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from moslim.data.sources.base import Source
from moslim.preferences import Preference, PreferenceSet

TRIES = 1000
"""Draws after which a sampler gives up."""


def draw_levels(preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
    """Draws ``count`` different dimensions and a level for each, all uniformly."""
    chosen = sorted(generator.sample(range(len(preferences)), count))
    return Preference({preferences.names[i]: generator.randrange(preferences.sizes[i]) for i in chosen})


class PreferenceSampler(ABC):
    """Draws the preference of one training prompt. Subclass it, and name the subclass under ``data.sampler``.

    A sampler may learn from the run. What it learns takes effect at the start of the next epoch: within an epoch,
    what :meth:`draw` returns is a function of the generator alone. Workers may then draw as far ahead as they like,
    every process draws the same, and a resumed run goes on with the same draws. Make epochs as short as the sampler
    is to be quick, with ``trainer.limit_train_batches``.
    """

    @abstractmethod
    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """Returns a preference; an empty one makes a prompt without an instruction.

        Args:
            preferences: The dimensions in use.
            generator: The only source of randomness to use; its seed is a function of seed, epoch and row.
            source: Says what is reachable, and what is held out: a held-out preference must not be returned.
        """

    def start_epoch(self, epoch: int, preferences: PreferenceSet) -> None:  # noqa: B027 (optional)
        """The only place where what :meth:`draw` depends on may change.

        Called in every process before an epoch's first draw and before workers, which copy the sampler, are started;
        again with the same epoch when a run is resumed in the middle of it, after :meth:`load_state_dict`: nothing
        may change then.
        """

    def observe(self, preferences: PreferenceSet, probs: Tensor, targets: Tensor) -> None:  # noqa: B027 (optional)
        """Takes in the answers of a training rollout, those of all processes, for the next :meth:`start_epoch`.

        Args:
            preferences: The ``D`` dimensions.
            probs: ``[N, D, K]`` level probabilities.
            targets: ``[N, D]`` int64, requested level, -1 where none was.
        """

    def metrics(self) -> dict[str, float]:
        """What to log with every rollout, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as plain data; empty for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Inverse of :meth:`state_dict`."""
