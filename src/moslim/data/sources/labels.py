"""Levels and votes from the fields of a row.

From what a table says to a level.

From the columns of a row to levels, and to the votes of several raters.

From a column of a row to the levels that a policy was asked for.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moslim.data.sources.records import Record, find, has_column, require
from moslim.data.types import Example, agreed_level
from moslim.preferences import Dimension, PreferenceSet
from moslim.utils.errors import Scalar, UsageError, as_number, as_text, as_whole_number, is_same, listed, quoted


def is_missing(value: Any) -> bool:
    """Whether a field holds no label: absent, null, NaN or blank."""
    return value is None or is_nan(value) or (isinstance(value, str) and not value.strip())


def is_nan(value: Any) -> bool:
    """Whether a field is not a number, though something stands there: it is missing, but hardly on purpose."""
    if isinstance(value, str):
        return value.strip().lower() == "nan"
    return isinstance(value, float) and math.isnan(value)


@dataclass
class Scale:
    """How the values of a column become levels 0..K-1. At most one of the first three is given.

    Args:
        offset: Added to a whole number: -1 turns ratings 1..5 into levels 0..4.
        values: Level of each value, e.g. ``{poor: 0, fair: 1, good: 2}`` or ``{false: 0, true: 1}``; compared as
            :func:`~moslim.utils.errors.is_same` says.
        bins: Ascending borders: the level is the number of borders that are at most the value. ``[0.3, 0.7]``
            turns scores into three levels. Compared as decimals, as they are written.
        missing: Values that are no label, such as ``N/A`` or ``Unsure``; blank, null and NaN never are one.
    """

    offset: int = 0
    values: Mapping[Scalar, int] | None = None
    bins: list[float] | None = None
    missing: Sequence[Scalar] | None = None

    def __post_init__(self) -> None:
        if (self.offset != 0) + (self.values is not None) + (self.bins is not None) > 1:
            raise UsageError(f"{self}: give at most one of offset, values and bins")
        if self.bins is not None:
            if not all(map(math.isfinite, self.bins)):
                raise UsageError(f"bins {self.bins} must be finite numbers")
            if any(a >= b for a, b in zip(self.bins, self.bins[1:], strict=False)):
                raise UsageError(f"bins {self.bins} must be ascending")
        self._borders = [Decimal(repr(float(border))) for border in self.bins or ()]
        self._missing = [as_text(value, "scales.missing") for value in self.missing or ()]
        self._levels: list[tuple[str, int]] = []
        for key, level in (self.values or {}).items():
            text = _key_text(key)
            if type(level) is not int or level < 0:
                raise UsageError(f"scales.values: {quoted(text)} is given the level {quoted(level)}: give 0 or more")
            same = [known for known, other in self._levels if other != level and _may_be_one(known, text)]
            if same:
                raise UsageError(f"scales.values: {quoted(same[0])} and {quoted(text)} are one value with two levels")
            self._levels.append((text, level))

    def is_missing(self, value: Any) -> bool:
        """Whether a value is no label."""
        return is_missing(value) or any(is_same(value, text) for text in self._missing)

    def level(self, value: Any) -> int:
        """Returns the level of a value that is not missing.

        Raises:
            UsageError: The value is none that this scale knows.
        """
        if self.values is not None:
            for text, level in self._levels:
                if is_same(value, text):
                    return level
            raise UsageError(f"value {quoted(value)} is none of [{listed(repr(text) for text, _ in self._levels)}]")
        if isinstance(value, bool):
            raise UsageError(f"value {value} is a truth value: give `values`, e.g. {{false: 0, true: 1}}")
        if self.bins is not None:
            return bisect_right(self._borders, as_number(value))
        number = as_number(value)
        if number != number.to_integral_value():
            raise UsageError(f"value {quoted(value)} is not a whole number: give `bins` for this dimension")
        return as_whole_number(number) + self.offset


def _key_text(key: Scalar) -> str:
    """The text of a key of ``values``; Python code may give numbers and truth values, of which YAML keeps the text."""
    return str(key).lower() if isinstance(key, bool | float) else as_text(key, "scales.values")


def _may_be_one(a: str, b: str) -> bool:
    """Whether some value of a table would be both."""
    if is_same(a, b):
        return True
    try:
        return as_number(a) == as_number(b)
    except UsageError:
        return False


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


def requested_levels(record: Record, path: str, preferences: PreferenceSet) -> dict[str, int]:
    """Returns level by dimension name; dimensions that were not asked for, or are not in use, are left out.

    Args:
        record: The row.
        path: Where it holds an object with a level for each dimension that was asked for; null = for none.
        preferences: The dimensions in use.

    Raises:
        UsageError: There is no such column, or it holds something else.
    """
    asked = require(record, path, "requested")
    where = f"{record.place}, field '{path}'"
    if asked is None:
        return {}
    if not isinstance(asked, dict):
        raise UsageError(f"{where}: {quoted(asked)} is no object with the level of each dimension")
    return {
        dimension.name: level_of(asked[dimension.name], Scale(), dimension, where)
        for dimension in preferences.dimensions
        if not is_missing(asked.get(dimension.name))
    }
