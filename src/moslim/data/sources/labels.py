"""From the columns of a row to levels, and to the votes of several raters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from moslim.data.sources.fields import find, has_column, require
from moslim.data.sources.records import Record
from moslim.data.sources.scale import Scale, is_missing, is_nan
from moslim.data.sources.votes import agreed_level
from moslim.data.types import Example
from moslim.errors import UsageError
from moslim.literals import as_number, as_whole_number, quoted
from moslim.preferences import Dimension, PreferenceSet

_LEVELS = Scale()
"""Labels that are levels already."""
_MOST_RATERS = 10_000
_ROUNDING = Decimal("0.01")
"""By how much a share times the number of raters may miss a whole number, since shares are rounded."""


class Labels:
    """Reads the labels of rows; the arguments are those of :class:`~moslim.data.Table`."""

    def __init__(
        self,
        columns: dict[str, str | list[str]] | None = None,
        scales: dict[str, Scale] | None = None,
        counts: dict[str, str] | None = None,
    ) -> None:
        self.columns = columns or {}
        self.scales = scales or {}
        self.counts = counts or {}
        for name in self.counts.keys() & self.scales.keys():
            raise UsageError(f"dimension '{name}': give either scales or counts, which is for shares of yes votes")

    def check(self, preferences: PreferenceSet) -> None:
        """Raises an error that lists the known dimensions if an argument names another one."""
        for option, named in (("columns", self.columns), ("scales", self.scales), ("counts", self.counts)):
            check_names(f"data.source.{option}", named, preferences)
        for name in self.counts:
            if len(preferences[name].levels) != 2:
                raise UsageError(f"counts.{name}: votes of yes or no need two levels, not {preferences[name].levels}")

    def paths(self, dimension: str) -> list[str]:
        """Returns the columns of a dimension's labels."""
        paths = self.columns.get(dimension, dimension)
        return [paths] if isinstance(paths, str) else paths

    def votes(self, record: Record, preferences: PreferenceSet, required: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Returns the level that each rater gave, by dimension; dimensions without a label are left out.

        Args:
            record: The row.
            preferences: The dimensions in use.
            required: Dimensions that must have a column; one that ``columns`` names always must.

        Raises:
            UsageError: A column is missing, or a value is no level of its dimension.
        """
        found = {}
        for dimension in preferences.dimensions:
            votes: list[int] = []
            for path in self.paths(dimension.name):
                if has_column(record, path) or dimension.name in (*required, *self.columns):
                    votes += self._column(record, path, dimension)
            if votes:
                found[dimension.name] = tuple(votes)
        return found

    def not_numbers(self, record: Record, preferences: PreferenceSet) -> list[str]:
        """Returns the columns of labels where a row has NaN."""
        paths = [path for name in preferences.names for path in self.paths(name)]
        found = {path: find(record.fields, path) for path in paths}
        return [
            path for path, value in found.items() if any(map(is_nan, value if isinstance(value, list) else [value]))
        ]

    def warn_if_constant(self, table: str, rows: Sequence[Example], names: Sequence[str]) -> None:
        """Warns of dimensions whose labels are all the same in a table, or that none of its rows has a label for."""
        for name in names:
            levels = [row.levels[name] for row in rows if name in row.levels]
            field = " and ".join(f"'{path}'" for path in self.paths(name))
            if rows and not levels:
                warnings.warn(
                    f"{table}: no training row has a label for dimension '{name}' (field {field})", stacklevel=3
                )
            elif len(levels) > 1 and len(set(levels)) == 1:
                warnings.warn(
                    f"{table}: all {len(levels)} training labels of dimension '{name}' (field {field}) are level "
                    f"{levels[0]}, so its head will learn nothing else",
                    stacklevel=3,
                )

    def _column(self, record: Record, path: str, dimension: Dimension) -> list[int]:
        value = require(record, path, f"columns.{dimension.name}")
        where = f"{record.place}, field '{path}'"
        if dimension.name in self.counts:
            count = require(record, self.counts[dimension.name], f"counts.{dimension.name}")
            return _yes_and_no(value, count, where)
        values = value if isinstance(value, list) else [value]
        scale = self.scales.get(dimension.name, _LEVELS)
        return [level_of(one, scale, dimension, where) for one in values if not scale.is_missing(one)]


def check_names(option: str, names: Iterable[str], preferences: PreferenceSet) -> None:
    """Raises a KeyError that lists the known dimensions if an option names another one."""
    for name in names:
        if name not in preferences.names:
            raise UsageError(f"{option}: no dimension '{name}'; there are: {', '.join(preferences.names)}")


def levels_of(votes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the level that the votes of each dimension come to."""
    return {name: agreed_level(given) for name, given in votes.items()}


def several(votes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the votes of the dimensions that more than one rater looked at."""
    return {name: given for name, given in votes.items() if len(given) > 1}


def level_of(value: Any, scale: Scale, dimension: Dimension, where: str) -> int:
    """Returns the level that a value is on a scale.

    Args:
        value: The value, which is not missing.
        scale: What makes a level of it.
        dimension: What it is a level of.
        where: Where it stands, for error messages.

    Raises:
        UsageError: It is no level of the dimension.
    """
    try:
        level = scale.level(value)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if not 0 <= level < len(dimension.levels):
        raise UsageError(
            f"{where}: value {quoted(value)} is level {level}, outside 0..{len(dimension.levels) - 1} of dimension "
            f"'{dimension.name}'; change its levels or give scales.{dimension.name}"
        )
    return level


def _yes_and_no(share: Any, count: Any, where: str) -> list[int]:
    """The votes behind a share of yes votes."""
    if is_missing(share) or is_missing(count):
        return []
    try:
        part, raters = as_number(share), as_whole_number(count)
    except UsageError as error:
        raise UsageError(
            f"{where}: {quoted(share)} of {quoted(count)} votes: give a share, 0 to 1, and a whole number ({error})"
        ) from None
    if not 0 <= raters <= _MOST_RATERS:
        raise UsageError(f"{where}: {raters} raters: give 0 to {_MOST_RATERS}")
    yes = round(part * raters)
    if abs(part * raters - yes) > _ROUNDING or not 0 <= part <= 1:
        raise UsageError(f"{where}: {quoted(share)} is no share of {raters} votes")
    return [0] * (raters - yes) + [1] * yes
