"""One row per message of a tree of conversations."""

from __future__ import annotations

from typing import Any

from moslim.data.sources.fields import find, require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record
from moslim.errors import UsageError
from moslim.literals import quoted


class Replies(Layout):
    """Messages that name the message they reply to, as OpenAssistant publishes them.

    Each rated assistant message becomes a row with the columns ``context`` (the messages before it, first to last, as
    ``{"role": ..., "text": ...}``), ``response``, and ``ratings`` and ``counts`` by name of the attribute. A message
    without ratings, or whose conversation is not complete in the table, is left out.
    """

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        messages = {str(require(record, "message_id", "layout")): record for record in records}
        rows = []
        for record in records:
            names = find(record.fields, "labels.name")
            if require(record, "role", "layout") != "assistant" or not names:
                continue
            context = _before(record, messages)
            if context is None:
                continue
            new = {
                "context": context,
                "response": require(record, "text", "layout"),
                "ratings": _by_name(record, names, "value"),
                "counts": _by_name(record, names, "count"),
            }
            rows.append(Record(record.place, {**record.fields, **new}))
        return rows


def _by_name(record: Record, names: Any, kind: str) -> dict[str, Any]:
    """Values of one kind by name of the attribute."""
    values = find(record.fields, f"labels.{kind}")
    lists = isinstance(names, list) and isinstance(values, list) and len(names) == len(values)
    if not lists or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"{record.place}, field 'labels.{kind}': {quoted(values)} is no list with an entry for each of "
            f"'labels.name', {quoted(names)}"
        )
    return dict(zip(names, values, strict=True))


def _before(record: Record, messages: dict[str, Record]) -> list[dict[str, Any]] | None:
    """The conversation up to a message; None where a message of it is not in the table."""
    context: list[dict[str, Any]] = []
    seen: set[str] = set()
    message = record
    while (parent := require(message, "parent_id", "layout")) is not None:
        if str(parent) in seen:
            raise UsageError(f"{record.place}, field 'parent_id': message {quoted(parent)} replies to itself")
        seen.add(str(parent))
        if str(parent) not in messages:
            return None
        message = messages[str(parent)]
        context.insert(0, {name: require(message, name, "layout") for name in ("role", "text")})
    return context
