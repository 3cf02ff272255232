"""What is odd about some rows without being wrong: said once for a table, not once per row."""

from __future__ import annotations

import warnings


class Notices:
    """Counts rows by what is odd about them."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: str) -> None:
        """Notes one row.

        Args:
            what: What is odd about it.
            place: Where it stands.
        """
        self._places.setdefault(what, []).append(place)

    def warn(self, rows: int) -> None:
        """Warns of each oddity with the number of its rows, out of ``rows``, and the first of them."""
        for what, places in self._places.items():
            warnings.warn(f"{len(places)} of {rows} rows: {what} (first: {places[0]})", stacklevel=3)
