"""One text that holds question and answer, as in prompts that were made for a judge."""

from __future__ import annotations

import re

from moslim.data.sources.fields import require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record
from moslim.errors import UsageError


class Pattern(Layout):
    """Takes a field apart; each named group of a regular expression becomes a column.

    Args:
        field: The field.
        pattern: What the whole field must look like, e.g. ``Q: (?P<question>.*)\\nA: (?P<answer>.*)\\nTrue:``. A dot
            stands for line ends, too.

    Raises:
        UsageError: The pattern is no regular expression, or names no group.
    """

    def __init__(self, field: str, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UsageError(f"layout.pattern is no regular expression: {error}") from None
        if not self.pattern.groupindex:
            raise UsageError(f"layout.pattern names no columns: write them as (?P<answer>.*), not {pattern!r}")
        self.field = field

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [Record(record.place, {**record.fields, **self._columns(record)}) for record in records]

    def _columns(self, record: Record) -> dict[str, str]:
        value = require(record, self.field, "layout.field")
        found = self.pattern.fullmatch(str(value))
        if found is None:
            raise UsageError(
                f"{record.place}, field '{self.field}': {str(value)[:80]!r} is not like {self.pattern.pattern!r}"
            )
        return found.groupdict(default="")
