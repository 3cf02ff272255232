"""Layouts: question-answer rows from tables whose rows are something else.

The interface of every layout.

One row with two dialogues that part at their last turn.

One row with a list of answers.

Texts in which quotes and other characters are written as escapes.

One text that holds question and answer, as in prompts that were made for a judge.

One row per message of a tree of conversations.

One row with two answers, and which of them is better.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from moslim.data.sources.conversations import split_turns
from moslim.data.sources.labels import is_missing
from moslim.data.sources.records import Notices, Record, find, require
from moslim.data.types import Message
from moslim.utils.errors import UsageError, as_number, quoted


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


class Dialogues(Layout):
    """Two whole dialogues, of which people preferred one, as in HH-RLHF.

    The new rows have the columns ``question`` (the turns that both share, as messages), ``answer`` and ``rejected``
    (their last turns). Dialogues that part earlier are left out, since no single answer was compared, and counted in a
    warning.

    Args:
        chosen: Column of the preferred dialogue.
        rejected: Column of the other.
        user: What stands before a user turn.
        assistant: What stands before an assistant turn.
    """

    def __init__(
        self,
        chosen: str = "chosen",
        rejected: str = "rejected",
        user: str = "\n\nHuman:",
        assistant: str = "\n\nAssistant:",
    ) -> None:
        self.chosen = chosen
        self.rejected = rejected
        self.user = user
        self.assistant = assistant

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        notices = Notices()
        rows = []
        for record in records:
            chosen = self._turns(record, self.chosen, "layout.chosen")
            rejected = self._turns(record, self.rejected, "layout.rejected")
            if not _part_at_the_last_answer(chosen, rejected):
                notices.add("left out, since the two dialogues do not part at their last answer", record.place)
                continue
            new = {"question": chosen[:-1], "answer": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
            rows.append(Record(record.place, {**record.fields, **new}))
        notices.warn(len(records))
        return rows

    def _turns(self, record: Record, column: str, argument: str) -> list[Message]:
        text = require(record, column, argument)
        if not isinstance(text, str):
            raise UsageError(f"{record.place}, field '{column}': the dialogue is {quoted(text)}, not a text")
        return split_turns(text, self.user, self.assistant)


def _part_at_the_last_answer(chosen: list[Message], rejected: list[Message]) -> bool:
    ends = [message["role"] for message in (*chosen[-2:], *rejected[-2:])]
    return ends == ["user", "assistant"] * 2 and chosen[:-1] == rejected[:-1]


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


@dataclass
class Verdict:
    """A column that says which of two answers is better.

    Args:
        column: A number, or a list of several raters' numbers, of which the mean counts: raters who disagree make a
            small margin, or none.
        dimensions: The dimensions that it speaks about; empty = all.
        tie: The number that calls the answers equally good: below it the first is better, above it the second.
        graded: Whether the distance from ``tie`` says how clearly, and becomes the margin.
    """

    column: str
    dimensions: list[str] = field(default_factory=list)
    tie: float = 0.0
    graded: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.tie):
            raise UsageError(f"layout.verdicts: the tie of '{self.column}' is {self.tie}: give a finite number")

    def lead(self, record: Record) -> float:
        """Returns by how much the second answer is better; negative if the first is, 0 if nothing is said."""
        value = require(record, self.column, "layout.verdicts")
        given = [one for one in (value if isinstance(value, list) else [value]) if not is_missing(one)]
        try:
            numbers = list(map(as_number, given))
        except UsageError as error:
            raise UsageError(f"{record.place}, field '{self.column}': {error}") from None
        tie = Decimal(repr(float(self.tie)))
        return float(sum(numbers, Decimal()) / len(numbers) - tie) if numbers else 0.0


class SideBySide(Layout):
    """Each of two answers becomes a row of its own; one that a verdict calls better has the other to compare with.

    The new rows have the columns ``answer``, ``rejected`` (null where the answer won nothing),
    ``comparison_dimensions`` (the dimensions on which it won; empty = all) and ``margin``, and what else ``first`` and
    ``second`` name. An answer that won nothing and has no column of its own is left out: nothing is said about it.

    Args:
        first: New column to field of the first answer: ``{answer: response_0, safe: is_response_0_safe}``.
        second: The same for the second answer.
        verdicts: What says which is better.
    """

    def __init__(self, first: dict[str, str], second: dict[str, str], verdicts: list[Verdict]) -> None:
        for name, columns in (("first", first), ("second", second)):
            if "answer" not in columns:
                raise UsageError(f"layout.{name} is {columns}: it must say which field is the `answer`")
        self.answers = {"first": first, "second": second}
        self.verdicts = verdicts

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [row for record in records for row in self._both(record)]

    def _both(self, record: Record) -> list[Record]:
        first, second = (
            {name: require(record, path, f"layout.{which}") for name, path in columns.items()}
            for which, columns in self.answers.items()
        )
        leads = [verdict.lead(record) for verdict in self.verdicts]
        rows = [
            self._row(record, "first", first, second["answer"], [-lead for lead in leads]),
            self._row(record, "second", second, first["answer"], leads),
        ]
        return [row for row in rows if row is not None]

    def _row(
        self, record: Record, which: str, columns: dict[str, object], other: object, leads: list[float]
    ) -> Record | None:
        won = [(verdict, lead) for verdict, lead in zip(self.verdicts, leads, strict=True) if lead > 0]
        if not won and len(columns) == 1:
            return None
        margins = [lead for verdict, lead in won if verdict.graded]
        about_all = any(not v.dimensions for v, _ in won)
        comparison = {
            "rejected": other if won else None,
            "comparison_dimensions": [] if about_all else [d for v, _ in won for d in v.dimensions],
            "margin": sum(margins) / len(margins) if margins else 0.0,
        }
        return Record(f"{record.place}, {which} answer", {**record.fields, **columns, **comparison})
