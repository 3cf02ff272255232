"""Texts in which quotes and other characters are written as escapes."""

from __future__ import annotations

import json
import re

from moslim.data.sources.fields import require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record
from moslim.errors import UsageError
from moslim.literals import quoted

_ESCAPE = re.compile(r"""(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]""")


class Escaped(Layout):
    r"""Writes JSON's escapes out, such as ``\"`` and ``\u00a3``, in tables that kept them; other backslashes stay.

    Args:
        columns: The columns in which there are some.
    """

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [
            Record(row.place, {**row.fields, **{name: self._plain(row, name) for name in self.columns}})
            for row in records
        ]

    def _plain(self, record: Record, column: str) -> str:
        text = require(record, column, "layout.columns")
        if not isinstance(text, str):
            raise UsageError(f"{record.place}, field '{column}': {quoted(text)} is not a text")
        return _ESCAPE.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    """A character; one beyond the first 65536 is two escapes, and half of it, where a text was cut, is U+FFFD."""
    text: str = json.loads(f'"{found[0]}"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
