"""Reading of labels from the fields of a row: levels, votes of several raters, and requested levels."""

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
    """Whether a field is NaN, as a number or text; NaN counts as missing, with a warning."""
    if isinstance(value, str):
        return value.strip().lower() == "nan"
    return isinstance(value, float) and math.isnan(value)


@dataclass
class Scale:
    """Conversion of the values of a column to levels 0..K-1. Give at most one of the first three arguments.

    Args:
        offset: Added to whole numbers: -1 turns ratings 1..5 into levels 0..4.
        values: Level of each value, e.g. ``{poor: 0, fair: 1, good: 2}`` or ``{false: 0, true: 1}``; compared by
            :func:`~moslim.utils.errors.is_same`.
        bins: Ascending borders; the level is the number of borders at or below the value. ``[0.3, 0.7]`` turns scores
            into three levels. Compared as decimals.
        missing: Values without a label, such as ``N/A`` or ``Unsure``; blank, null and NaN are always missing.
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
            conflicts = [other for other, other_level in self._levels if other_level != level and _overlap(other, text)]
            if conflicts:
                raise UsageError(
                    f"scales.values: {quoted(conflicts[0])} and {quoted(text)} are one value with two levels"
                )
            self._levels.append((text, level))

    def is_missing(self, value: Any) -> bool:
        """Whether a value holds no label."""
        return is_missing(value) or any(is_same(value, text) for text in self._missing)

    def level(self, value: Any) -> int:
        """Returns the level of a value that is not missing.

        Raises:
            UsageError: The value is not on this scale.
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
    """Text of a key of ``values``; from Python, keys may be numbers or truth values."""
    return str(key).lower() if isinstance(key, bool | float) else as_text(key, "scales.values")


def _overlap(a: str, b: str) -> bool:
    """Whether one value of a table can match both keys."""
    if is_same(a, b):
        return True
    try:
        return as_number(a) == as_number(b)
    except UsageError:
        return False


_LEVELS = Scale()
"""Scale of labels that are levels already."""
_MOST_RATERS = 10_000
_ROUNDING = Decimal("0.01")
"""Tolerance of a share times the number of raters to a whole number, since shares are rounded."""


class Labels:
    """Reader of the labels in a row; the arguments are those of :class:`~moslim.data.Table`."""

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
        """Checks the dimensions that the arguments name.

        Raises:
            UsageError: A dimension is unknown, or one in ``counts`` does not have two levels.
        """
        for option, names in (("columns", self.columns), ("scales", self.scales), ("counts", self.counts)):
            check_names(f"data.source.{option}", names, preferences)
        for name in self.counts:
            if len(preferences[name].levels) != 2:
                raise UsageError(f"counts.{name}: votes of yes or no need two levels, not {preferences[name].levels}")

    def paths(self, dimension: str) -> list[str]:
        """Returns the columns that hold the labels of a dimension."""
        paths = self.columns.get(dimension, dimension)
        return [paths] if isinstance(paths, str) else paths

    def votes(self, record: Record, preferences: PreferenceSet, required: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Returns the level from each rater by dimension name; dimensions without a label are omitted.

        Args:
            record: The row.
            preferences: The dimensions in use.
            required: Dimensions that must have a column, besides those that ``columns`` names.

        Raises:
            UsageError: A column is missing, or a value is no level of its dimension.
        """
        votes_by_name = {}
        for dimension in preferences.dimensions:
            votes: list[int] = []
            for path in self.paths(dimension.name):
                if has_column(record, path) or dimension.name in (*required, *self.columns):
                    votes += self._votes_in(record, path, dimension)
            if votes:
                votes_by_name[dimension.name] = tuple(votes)
        return votes_by_name

    def not_numbers(self, record: Record, preferences: PreferenceSet) -> list[str]:
        """Returns the label columns in which a row has NaN."""
        paths = [path for name in preferences.names for path in self.paths(name)]
        values = {path: find(record.fields, path) for path in paths}
        return [
            path for path, value in values.items() if any(map(is_nan, value if isinstance(value, list) else [value]))
        ]

    def warn_if_constant(self, table: str, rows: Sequence[Example], names: Sequence[str]) -> None:
        """Warns of dimensions whose labels in a table are all equal or all missing."""
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

    def _votes_in(self, record: Record, path: str, dimension: Dimension) -> list[int]:
        value = require(record, path, f"columns.{dimension.name}")
        where = f"{record.place}, field '{path}'"
        if dimension.name in self.counts:
            count = require(record, self.counts[dimension.name], f"counts.{dimension.name}")
            return _yes_no_votes(value, count, where)
        values = value if isinstance(value, list) else [value]
        scale = self.scales.get(dimension.name, _LEVELS)
        return [level_of(entry, scale, dimension, where) for entry in values if not scale.is_missing(entry)]


def check_names(option: str, names: Iterable[str], preferences: PreferenceSet) -> None:
    """Checks the dimensions that an option names.

    Raises:
        UsageError: A dimension is unknown; the message lists the known ones.
    """
    for name in names:
        if name not in preferences.names:
            raise UsageError(f"{option}: no dimension '{name}'; there are: {', '.join(preferences.names)}")


def levels_of(votes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the agreed level of each dimension, see :func:`~moslim.data.types.agreed_level`."""
    return {name: agreed_level(levels) for name, levels in votes.items()}


def with_several_votes(votes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the votes of the dimensions with more than one rater."""
    return {name: levels for name, levels in votes.items() if len(levels) > 1}


def level_of(value: Any, scale: Scale, dimension: Dimension, where: str) -> int:
    """Returns the level of a value on a scale.

    Args:
        value: The value, not missing.
        scale: Conversion to a level.
        dimension: Dimension of the level.
        where: Place of the value, for error messages.

    Raises:
        UsageError: The value is not on the scale, or the dimension does not have its level.
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


def _yes_no_votes(share: Any, count: Any, where: str) -> list[int]:
    """Votes (0 or 1) that give a share of yes votes among a number of raters."""
    if is_missing(share) or is_missing(count):
        return []
    try:
        yes_share, raters = as_number(share), as_whole_number(count)
    except UsageError as error:
        raise UsageError(
            f"{where}: {quoted(share)} of {quoted(count)} votes: give a share, 0 to 1, and a whole number ({error})"
        ) from None
    if not 0 <= raters <= _MOST_RATERS:
        raise UsageError(f"{where}: {raters} raters: give 0 to {_MOST_RATERS}")
    yes = round(yes_share * raters)
    if abs(yes_share * raters - yes) > _ROUNDING or not 0 <= yes_share <= 1:
        raise UsageError(f"{where}: {quoted(share)} is no share of {raters} votes")
    return [0] * (raters - yes) + [1] * yes


def requested_levels(record: Record, path: str, preferences: PreferenceSet) -> dict[str, int]:
    """Returns the requested level by dimension name; dimensions not requested or not in use are omitted.

    Args:
        record: The row.
        path: Field with an object of requested level by dimension name; null = none requested.
        preferences: The dimensions in use.

    Raises:
        UsageError: The column is missing, or its value is not such an object.
    """
    requested = require(record, path, "requested")
    where = f"{record.place}, field '{path}'"
    if requested is None:
        return {}
    if not isinstance(requested, dict):
        raise UsageError(f"{where}: {quoted(requested)} is no object with the level of each dimension")
    return {
        dimension.name: level_of(requested[dimension.name], Scale(), dimension, where)
        for dimension in preferences.dimensions
        if not is_missing(requested.get(dimension.name))
    }
