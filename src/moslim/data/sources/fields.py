"""Finds a field of a row, also inside nested objects and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moslim.data.sources.records import Record
from moslim.errors import UsageError
from moslim.literals import listed


def find(inside: Any, path: str) -> Any:
    """Returns what stands at a path, or None where there is nothing.

    Args:
        inside: An object, e.g. the fields of a record.
        path: Names and list positions joined by dots: ``ratings.quality``, ``turns.0``. ``*`` stands for every entry of
            a list: ``raters.*.score`` is a list of scores. A field whose own name has dots is found, too.
    """
    if isinstance(inside, Mapping) and path in inside:
        return inside[path]
    step, _, rest = path.partition(".")
    if isinstance(inside, list) and step == "*":
        return [find(entry, rest) if rest else entry for entry in inside]
    entry = None
    if isinstance(inside, list) and _is_position(step) and int(step) < len(inside):
        entry = inside[int(step)]
    elif isinstance(inside, Mapping):
        entry = inside.get(step)
    return find(entry, rest) if rest else entry


def _is_position(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10


def has_column(record: Record, path: str) -> bool:
    """Whether the table has the column in which a path starts; what it leads to may still be missing in a row."""
    return path in record.fields or path.partition(".")[0] in record.fields


def require(record: Record, path: str, argument: str) -> Any:
    """Like :func:`find`, for a column that must be there.

    Args:
        record: The row.
        path: The path.
        argument: Argument that named the column, for the error message.

    Raises:
        UsageError: The table has no such column.
    """
    if not has_column(record, path):
        raise UsageError(
            f"{record.place}: no field '{path}'; there are: {listed(record.fields)}. "
            f"Name the right one in `{argument}` of the Table"
        )
    return find(record.fields, path)
