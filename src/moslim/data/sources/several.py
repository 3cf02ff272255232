"""Several sources as one."""

from __future__ import annotations

from collections.abc import Iterator

from moslim.data.sources.base import Source
from moslim.data.sources.overlap import warn_if_shared
from moslim.data.types import Example, RowKind, Split
from moslim.errors import UsageError
from moslim.preferences import Preference, PreferenceSet


class ConcatSource(Source):
    """The rows of several sources, one after the other, e.g. tables that label different dimensions.

    Args:
        sources: The sources; in YAML also files that hold one each.
    """

    def __init__(self, sources: list[Source]) -> None:
        if not sources:
            raise UsageError("source.sources is empty: name at least one source")
        self.sources = sources

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. Questions of held-out rows that another source trains on are said in a warning."""
        parts = [source.rows(kind, split, preferences, seed) for source in self.sources]
        if kind is RowKind.LABELLED and split in (Split.VALIDATION, Split.TEST) and len(self.sources) > 1:
            training = [source.rows(kind, Split.TRAIN, preferences, seed) for source in self.sources]
            for i, part in enumerate(parts):
                warn_if_shared(part, [row for j, rows in enumerate(training) if j != i for row in rows])
        return [row for part in parts for row in part]

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """See the base class. Rows to be scored are read one at a time where the sources can."""
        if kind is RowKind.LABELLED and split is Split.PREDICT:
            for source in self.sources:
                yield from source.stream(kind, split, preferences, seed)
        else:
            yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> list[Source]:
        """See the base class."""
        return self.sources

    def reachable(self, preference: Preference) -> bool:
        """Whether one of the sources calls it reachable."""
        return any(source.reachable(preference) for source in self.sources)

    def held_out(self, preference: Preference) -> bool:
        """Whether one of the sources holds it out."""
        return any(source.held_out(preference) for source in self.sources)
