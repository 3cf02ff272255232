"""One row with a list of answers."""

from __future__ import annotations

from moslim.data.sources.fields import require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record
from moslim.errors import UsageError
from moslim.literals import quoted


class Each(Layout):
    """Each entry of a list becomes a row of its own, such as UltraFeedback's completions.

    In the new rows the entry stands in place of the list: with ``column: completions``, its fields are
    ``completions.response`` and so on. The other columns are repeated.

    Args:
        column: Column of the list.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [row for record in records for row in self._entries(record)]

    def _entries(self, record: Record) -> list[Record]:
        entries = require(record, self.column, "layout.column")
        if not isinstance(entries, list):
            raise UsageError(f"{record.place}, field '{self.column}': {quoted(entries)} is not a list")
        return [
            Record(f"{record.place}, {self.column}.{i}", {**record.fields, self.column: entry})
            for i, entry in enumerate(entries)
        ]
