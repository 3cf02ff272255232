"""From the columns of a row to the answer that was liked less."""

from __future__ import annotations

from typing import NamedTuple

from moslim.data.sources.fields import require
from moslim.data.sources.labels import check_names
from moslim.data.sources.records import Record
from moslim.data.sources.scale import is_missing
from moslim.errors import UsageError
from moslim.literals import as_number, quoted
from moslim.preferences import PreferenceSet


class Comparison(NamedTuple):
    """The part of an :class:`~moslim.data.Example` that compares two answers; by default there is none."""

    rejected: str | None = None
    comparison_dimensions: tuple[str, ...] = ()
    margin: float = 0.0


class Comparisons:
    """Reads comparisons of rows; the arguments are those of :class:`~moslim.data.Table`."""

    def __init__(self, rejected: str | None, comparison_dimensions: str | list[str] | None, margin: str | None) -> None:
        if rejected is None and (comparison_dimensions or margin):
            raise UsageError("comparison_dimensions and margin say more about a `rejected` answer: name its column")
        self.rejected = rejected
        self.comparison_dimensions = comparison_dimensions or []
        self.margin = margin

    def check(self, preferences: PreferenceSet) -> None:
        """Raises an error that lists the known dimensions if ``comparison_dimensions`` names another one."""
        check_names(
            "data.source.comparison_dimensions",
            [] if isinstance(self.comparison_dimensions, str) else self.comparison_dimensions,
            preferences,
        )

    def read(self, record: Record, preferences: PreferenceSet) -> Comparison:
        """Returns a row's comparison.

        Raises:
            UsageError: A column is missing, or what it holds cannot be used.
        """
        if self.rejected is None:
            return Comparison()
        rejected = require(record, self.rejected, "rejected")
        if rejected is None:
            return Comparison()
        if not isinstance(rejected, str):
            raise UsageError(f"{record.place}, field '{self.rejected}': the answer is {quoted(rejected)}, not a text")
        return Comparison(rejected, self._dimensions(record, preferences), self._margin(record))

    def _dimensions(self, record: Record, preferences: PreferenceSet) -> tuple[str, ...]:
        if not isinstance(self.comparison_dimensions, str):
            return tuple(self.comparison_dimensions)
        named = require(record, self.comparison_dimensions, "comparison_dimensions")
        if not isinstance(named, list) or not all(isinstance(n, str) and n in preferences.names for n in named):
            raise UsageError(
                f"{record.place}, field '{self.comparison_dimensions}': {quoted(named)} is no list of dimensions; "
                f"there are: {', '.join(preferences.names)}"
            )
        return tuple(named)

    def _margin(self, record: Record) -> float:
        if self.margin is None:
            return 0.0
        value = require(record, self.margin, "margin")
        given = [one for one in (value if isinstance(value, list) else [value]) if not is_missing(one)]
        where = f"{record.place}, field '{self.margin}'"
        try:
            margin = float(sum(map(as_number, given)) / len(given)) if given else 0.0
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        if margin < 0:
            raise UsageError(f"{where}: value {quoted(value)} prefers the rejected answer")
        return margin
