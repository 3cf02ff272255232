"""What a policy is asked for when it is evaluated."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moslim.data.sources.base import Source
from moslim.noise import derive_seed
from moslim.preferences import Preference, PreferenceSet
from moslim.sampling import TRIES, draw_levels


@dataclass(frozen=True)
class Request:
    """One prompt of an evaluation, to be put to a question.

    Args:
        preference: The levels asked for.
        kind: ``sweep`` (one active dimension), ``default`` (no instruction), ``seen`` or ``unseen`` (a combination
            of dimensions that training could ask for, or that was held out from it).
    """

    preference: Preference
    kind: str


def sweep_requests(preferences: PreferenceSet) -> list[Request]:
    """Returns every level of every dimension, one dimension at a time, lowest first."""
    return [
        Request(Preference({dimension.name: level}), "sweep")
        for dimension in preferences.dimensions
        for level in range(len(dimension.levels))
    ]


def combination_requests(
    preferences: PreferenceSet, source: Source, count: int, seed: int, unseen: bool
) -> list[Request]:
    """Draws different combinations of two or more dimensions that some answer can have.

    Args:
        preferences: The dimensions in use.
        source: Says what is reachable and what is held out.
        count: How many to draw; fewer are returned if no more are found in a bounded number of draws.
        seed: Seed of the draws.
        unseen: Whether to draw among the combinations that are held out from training, or among the others.
    """
    if len(preferences) < 2:
        return []
    generator = random.Random(derive_seed(seed, int(unseen)))
    found: dict[Preference, None] = {}
    for _ in range(TRIES):
        if len(found) == count:
            break
        preference = draw_levels(preferences, generator.randint(2, len(preferences)), generator)
        if source.held_out(preference) == unseen and source.reachable(preference):
            found[preference] = None
    return [Request(preference, "unseen" if unseen else "seen") for preference in found]
