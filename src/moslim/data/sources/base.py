"""The interface of every data source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from moslim.data.types import Example, RowKind, Split
from moslim.preferences import Preference, PreferenceSet


class Source(ABC):
    """Rows of every kind. Subclass it, and name the subclass under ``data.source``."""

    @abstractmethod
    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """Returns the rows of one split, in a fixed order for a fixed seed.

        Args:
            kind: What the rows must have, see :class:`~moslim.data.types.RowKind`.
            split: Which part is asked for.
            preferences: The dimensions in use; a label outside their levels is an error.
            seed: Seed of everything that is drawn.

        Raises:
            ValueError: A row cannot be used; the message names file, line and field.
        """

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """Yields the same rows one by one. A source that need not hold them all in memory overrides it."""
        yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> Sequence[Source]:
        """The sources that this one reads from; none if it reads tables itself."""
        return ()

    def reachable(self, preference: Preference) -> bool:
        """Whether some answer can have these levels at once. Unreachable ones are not worth asking for."""
        return True

    def held_out(self, preference: Preference) -> bool:
        """Whether this combination is kept from training, to test what was never asked for."""
        return False
