"""Which preferences are asked for during training."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from moslim.data.sources.base import Source
from moslim.preferences import Preference, PreferenceSet

TRIES = 1000
"""Draws after which a sampler gives up."""


def draw_levels(preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
    """Draws ``count`` different dimensions and a level for each, all uniformly."""
    chosen = sorted(generator.sample(range(len(preferences)), count))
    return Preference({preferences.names[i]: generator.randrange(preferences.sizes[i]) for i in chosen})


class PreferenceSampler(ABC):
    """Draws the preference of one training prompt. Subclass it, and name the subclass under ``data.sampler``."""

    @abstractmethod
    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """Returns a preference; an empty one makes a prompt without an instruction.

        Args:
            preferences: The dimensions in use.
            generator: The only source of randomness to use; its seed is a function of seed, epoch and row.
            source: Says what is reachable, and what is held out: a held-out preference must not be returned.
        """


class Uniform(PreferenceSampler):
    """Draws how many dimensions are named, then which, then their levels, the last two uniformly.

    A combination that the source holds out is drawn again.

    Args:
        active: ``active[k]`` is the probability that ``k`` dimensions are named, so ``active[0]`` is the share of
            prompts without an instruction. The sum is 1. Default: 0.2 without, the rest spread evenly over the
            other numbers.

    Raises:
        ValueError: ``active`` holds a negative number or does not add up to 1.
    """

    def __init__(self, active: Sequence[float] | None = None) -> None:
        if active is not None and (min(active, default=-1.0) < 0 or abs(sum(active) - 1) > 1e-6):
            raise ValueError(f"sampler.active is {list(active)}: give probabilities that add up to 1")
        self.active = None if active is None else tuple(active)

    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """See the base class.

        Raises:
            ValueError: ``active`` counts more dimensions than there are, or no allowed preference was found.
        """
        weights = self._weights(len(preferences))
        count = generator.choices(range(len(weights)), weights)[0]
        for _ in range(TRIES):
            preference = draw_levels(preferences, count, generator)
            if not preference or self.allows(preference, source):
                return preference
        raise ValueError(
            f"{type(self).__name__} found no preference of {count} dimensions to ask for in {TRIES} draws: "
            f"{type(source).__name__} calls all of them unreachable or held out; set sampler.active[{count}] to 0"
        )

    def allows(self, preference: Preference, source: Source) -> bool:
        """Whether a preference that was drawn may be asked for."""
        return not source.held_out(preference)

    def _weights(self, dimensions: int) -> tuple[float, ...]:
        if self.active is None:
            return (0.2, *[0.8 / dimensions] * dimensions)
        if len(self.active) > dimensions + 1 and any(self.active[dimensions + 1 :]):
            raise ValueError(
                f"sampler.active has {len(self.active)} entries, for 0 to {len(self.active) - 1} named dimensions, "
                f"but there are only {dimensions} dimensions"
            )
        return self.active[: dimensions + 1]


class Reachable(Uniform):
    """Like :class:`Uniform`, but draws again until some answer can have the levels at once."""

    def allows(self, preference: Preference, source: Source) -> bool:
        """See the base class."""
        return source.reachable(preference) and super().allows(preference, source)
