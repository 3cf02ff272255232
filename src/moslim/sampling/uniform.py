"""Preferences drawn uniformly."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moslim.data.sources.base import Source
from moslim.errors import UsageError
from moslim.preferences import Preference, PreferenceSet
from moslim.sampling.base import TRIES, PreferenceSampler, draw_levels


class Uniform(PreferenceSampler):
    """Draws how many dimensions are named, then which, then their levels, the last two uniformly.

    A combination that the source holds out is drawn again.

    Args:
        active: ``active[k]`` is the probability that ``k`` dimensions are named, so ``active[0]`` is the share of
            prompts without an instruction. The sum is 1. Default: 0.2 without, the rest spread evenly over the
            other numbers.

    Raises:
        UsageError: ``active`` holds a negative number or does not add up to 1.
    """

    def __init__(self, active: Sequence[float] | None = None) -> None:
        if active is not None and (min(active, default=-1.0) < 0 or abs(sum(active) - 1) > 1e-6):
            raise UsageError(f"sampler.active is {list(active)}: give probabilities that add up to 1")
        self.active = None if active is None else tuple(active)

    def draw(self, preferences: PreferenceSet, generator: random.Random, source: Source) -> Preference:
        """See the base class.

        Raises:
            UsageError: ``active`` counts more dimensions than there are, or no allowed preference was found.
        """
        weights = self.counts(len(preferences))
        count = generator.choices(range(len(weights)), weights)[0]
        for _ in range(TRIES):
            preference = self.propose(preferences, count, generator)
            if not preference or self.allows(preference, source):
                return preference
        raise UsageError(
            f"{type(self).__name__} found no preference of {count} dimensions to ask for in {TRIES} draws: "
            f"{type(source).__name__} calls all of them unreachable or held out; set sampler.active[{count}] to 0"
        )

    def propose(self, preferences: PreferenceSet, count: int, generator: random.Random) -> Preference:
        """Draws ``count`` dimensions and their levels."""
        return draw_levels(preferences, count, generator)

    def allows(self, preference: Preference, source: Source) -> bool:
        """Whether a preference that was drawn may be asked for."""
        return not source.held_out(preference)

    def counts(self, dimensions: int) -> tuple[float, ...]:
        """Weights of the numbers of named dimensions, from 0 to at most ``dimensions``."""
        if self.active is None:
            return (0.2, *[0.8 / dimensions] * dimensions)
        if len(self.active) > dimensions + 1 and any(self.active[dimensions + 1 :]):
            raise UsageError(
                f"sampler.active has {len(self.active)} entries, for 0 to {len(self.active) - 1} named dimensions, "
                f"but there are only {dimensions} dimensions"
            )
        return self.active[: dimensions + 1]


class Reachable(Uniform):
    """Like :class:`Uniform`, but draws again until some answer can have the levels at once."""

    def allows(self, preference: Preference, source: Source) -> bool:
        """See the base class."""
        return source.reachable(preference) and super().allows(preference, source)
