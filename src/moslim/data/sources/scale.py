"""From what a table says to a level."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from moslim.errors import UsageError


def is_missing(value: Any) -> bool:
    """Whether a field holds no label: absent, null, NaN or blank."""
    return value is None or is_nan(value) or not str(value).strip()


def is_nan(value: Any) -> bool:
    """Whether a field is not a number, though something stands there: it is missing, but hardly on purpose."""
    return (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() == "nan"


@dataclass
class Scale:
    """How the values of a column become levels 0..K-1. At most one of the first three is given.

    Args:
        offset: Added to a whole number: -1 turns ratings 1..5 into levels 0..4.
        values: Level of each value, e.g. ``{poor: 0, fair: 1, good: 2}``.
        bins: Ascending borders: the level is the number of borders that are at most the value. ``[0.3, 0.7]``
            turns scores into three levels.
        missing: Values that are no label, such as ``N/A`` or ``Unsure``; blank, null and NaN never are one.
    """

    offset: int = 0
    values: dict[str, int] | None = None
    bins: list[float] | None = None
    missing: list[str] | None = None

    def __post_init__(self) -> None:
        if (self.offset != 0) + (self.values is not None) + (self.bins is not None) > 1:
            raise UsageError(f"{self}: give at most one of offset, values and bins")
        if self.bins is not None and any(a >= b for a, b in zip(self.bins, self.bins[1:], strict=False)):
            raise UsageError(f"bins {self.bins} must be ascending")

    def is_missing(self, value: Any) -> bool:
        """Whether a value is no label."""
        return is_missing(value) or str(value).strip() in (self.missing or ())

    def level(self, value: Any) -> int:
        """Returns the level of a value that is not missing.

        Raises:
            UsageError: The value is none that this scale knows.
        """
        if self.values is not None:
            if str(value).strip() not in self.values:
                raise UsageError(f"value {value!r} is none of {list(self.values)}")
            return self.values[str(value).strip()]
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"value {value!r} is not a number") from None
        if self.bins is not None:
            return bisect_right(self.bins, number)
        if not number.is_integer():
            raise UsageError(f"value {value!r} is not a whole number: give `bins` for this dimension")
        return int(number) + self.offset
