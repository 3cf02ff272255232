"""Every row is looked at when a run begins, so that none stops it later."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from moslim.data.neutralise import TakenOut
from moslim.data.types import Example
from moslim.errors import UsageError

_FEW = 3


def place_of(row: Example, number: int, what: str = "rows") -> str:
    """Returns where a row stands, by its number from 0 where the source does not say."""
    return row.place or f"row {number + 1} of the {what}"


def usable_rows(
    rows: Sequence[Example], check: Callable[[Example], bool], what: str = "rows", skipped: float = 0.0
) -> list[int]:
    """Returns the numbers of the rows that can be used, and warns of those that cannot.

    Args:
        rows: The rows.
        check: Raises a :class:`UsageError` for a row that cannot be used. It returns whether something is taken out of
            the row's texts, which is said in a warning.
        what: What the rows are called.
        skipped: Largest share of them that may be left out.

    Raises:
        UsageError: More rows cannot be used; or none can be.
    """
    kept: list[int] = []
    faults: list[str] = []
    changed = TakenOut()
    for number, row in enumerate(rows):
        try:
            if check(row):
                changed.add(place_of(row, number, what))
        except UsageError as error:
            faults.append(f"{place_of(row, number, what)}: {error}")
        else:
            kept.append(number)
    if len(faults) > skipped * len(rows) or (faults and not kept):
        others = "".join(f"\n{fault}" for fault in faults[1:_FEW])
        raise UsageError(
            f"{faults[0]}{others}\n{len(faults)} of {len(rows)} {what} cannot be used, more than the share that may "
            f"be left out, data.skip_bad_rows = {skipped}: mend the rows, or raise it"
        )
    if faults:
        warnings.warn(
            f"{len(faults)} of {len(rows)} {what} cannot be used and are left out, as data.skip_bad_rows = {skipped} "
            f"allows; the first: {faults[0]}",
            stacklevel=2,
        )
    if changed.texts:
        warnings.warn(f"{what}: {changed}", stacklevel=2)
    return kept
