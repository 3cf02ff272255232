"""One row per message of a tree of conversations."""

from __future__ import annotations

from typing import Any

from moslim.data.sources.fields import find, require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record


class Replies(Layout):
    """Messages that name the message they reply to, as OpenAssistant publishes them.

    Each rated assistant message becomes a row with the columns ``context`` (the messages before it, first to last, as
    ``{"role": ..., "text": ...}``), ``response``, and ``ratings`` and ``counts`` by name of the attribute. A message
    without ratings, or whose conversation is not complete in the table, is left out.
    """

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        messages = {str(require(record, "message_id", "layout")): record.fields for record in records}
        rows = []
        for record in records:
            names = find(record.fields, "labels.name")
            context = _before(record.fields, messages)
            if require(record, "role", "layout") != "assistant" or not names or context is None:
                continue
            new = {
                "context": context,
                "response": record.fields["text"],
                "ratings": dict(zip(names, find(record.fields, "labels.value"), strict=True)),
                "counts": dict(zip(names, find(record.fields, "labels.count"), strict=True)),
            }
            rows.append(Record(record.place, {**record.fields, **new}))
        return rows


def _before(message: dict[str, Any], messages: dict[str, dict[str, Any]]) -> list[dict[str, str]] | None:
    """The conversation up to a message; None where a message of it is not in the table."""
    context: list[dict[str, str]] = []
    while message["parent_id"] is not None:
        if message["parent_id"] not in messages:
            return None
        message = messages[message["parent_id"]]
        context.insert(0, {"role": message["role"], "text": message["text"]})
    return context
