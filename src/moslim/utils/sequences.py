"""Indices into sequences."""

from __future__ import annotations


def evenly_spaced(total: int, count: int) -> list[int]:
    """Returns ``count`` of ``total`` indices at equal distances, the first included, or all if there are fewer."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
