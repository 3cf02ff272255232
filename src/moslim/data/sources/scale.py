"""From what a table says to a level."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moslim.errors import UsageError
from moslim.literals import Scalar, as_number, as_text, as_whole_number, is_same, listed, quoted


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
            :func:`~moslim.literals.is_same` says.
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
