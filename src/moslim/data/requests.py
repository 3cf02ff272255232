"""Kinds of requests that a policy is evaluated with."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moslim.data.sources.base import Source
from moslim.errors import UsageError
from moslim.noise import derive_seed
from moslim.preferences import RESERVED_NAMES, Preference, PreferenceSet
from moslim.sampling import TRIES, draw_levels


@dataclass(frozen=True)
class Request:
    """One prompt of an evaluation, to be put to a question.

    Args:
        preference: The levels asked for.
        kind: Name of the :class:`EvaluationKind` that it is of.
    """

    preference: Preference
    kind: str


class EvaluationKind(ABC):
    """Requests that are put to each test question. Subclass it, and list the subclass under ``data.evaluation_kinds``.

    The report says of every kind how many answers meet all levels that were asked for, and their mean error.
    """

    name: str
    """Name in metrics and in the report, e.g. ``opposites``; no dimension can have it."""

    @abstractmethod
    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> Sequence[Preference]:
        """Returns what is asked of one question.

        Args:
            preferences: The dimensions in use.
            source: Says what is reachable and what is held out.
            seed: Seed of what is drawn; another one for each question.
        """


class Sweep(EvaluationKind):
    """Every level of every dimension, one dimension at a time, lowest first."""

    name = "sweep"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        return [
            Preference({dimension.name: level})
            for dimension in preferences.dimensions
            for level in range(len(dimension.levels))
        ]


class NoInstruction(EvaluationKind):
    """The question alone."""

    name = "default"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        return [Preference()]


class Combinations(EvaluationKind):
    """Different combinations of two or more dimensions that some answer can have.

    Args:
        count: How many; fewer are asked for if no more are found in a bounded number of draws.
        unseen: Whether to draw among the combinations that are held out from training, or among the others.
    """

    def __init__(self, count: int, unseen: bool) -> None:
        self.count, self.unseen = count, unseen
        self.name = "unseen" if unseen else "seen"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        if len(preferences) < 2:
            return []
        generator = random.Random(derive_seed(seed, int(self.unseen)))
        drawn: dict[Preference, None] = {}
        for _ in range(TRIES):
            if len(drawn) == self.count:
                break
            preference = draw_levels(preferences, generator.randint(2, len(preferences)), generator)
            if source.held_out(preference) == self.unseen and source.reachable(preference):
                drawn[preference] = None
        return list(drawn)


def requests(kinds: Iterable[EvaluationKind], preferences: PreferenceSet, source: Source, seed: int) -> list[Request]:
    """Returns the requests of all kinds to one question, in the order of the kinds."""
    return [Request(wanted, kind.name) for kind in kinds for wanted in kind.preferences(preferences, source, seed)]


def check_names(kinds: Sequence[EvaluationKind], preferences: PreferenceSet) -> None:
    """Refuses kinds that metrics and the report could not tell from something else.

    Args:
        kinds: Kinds besides the shipped ones.
        preferences: The dimensions in use.

    Raises:
        UsageError: A kind has no name, or that of another, of a dimension or of a part of the report.
    """
    taken = {*RESERVED_NAMES, *preferences.names}
    for kind in kinds:
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name or name in taken or set(name) & {"/", "."}:
            raise UsageError(
                f"data.evaluation_kinds: {type(kind).__name__} has the name {name!r}: give it a `name`, a text without "
                "'/' and '.', that no other kind, no dimension and no part of the report has"
            )
        taken.add(name)
