"""The interface of every layout."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moslim.data.sources.records import Record


class Layout(ABC):
    """Makes rows of one question and one answer. Subclass it, and name the subclass under ``source.layout``."""

    @abstractmethod
    def rows(self, records: list[Record]) -> list[Record]:
        """Returns the new rows, with the columns that the Table's arguments name.

        Args:
            records: All rows of a table, as they were read. Their fields must not be changed.

        Raises:
            ValueError: A row is not laid out in this way; the message names file, line and field.
        """
