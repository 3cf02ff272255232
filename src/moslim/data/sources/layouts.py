"""Layouts: convert rows of other shapes to rows of one question and one answer."""

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
    """Conversion of the rows of a table to rows of one question and one answer.

    Subclass it, and name the subclass under ``source.layout``.
    """

    @abstractmethod
    def rows(self, records: list[Record]) -> list[Record]:
        """Returns the new rows, with the columns that the arguments of the Table name.

        Args:
            records: All rows of a table. Their fields must not be modified.

        Raises:
            ValueError: A row has another layout; the message names file, line and field.
        """


class Dialogues(Layout):
    """Two whole dialogues per row, chosen and rejected, as in HH-RLHF.

    The new rows have the columns ``question`` (the shared turns, as messages), ``answer`` and ``rejected`` (the last
    turns). Dialogues that differ before their last turn are dropped and counted in a warning.

    Args:
        chosen: Column of the chosen dialogue.
        rejected: Column of the rejected dialogue.
        user: Marker before a user turn.
        assistant: Marker before an assistant turn.
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
            if not _differ_in_last_answer_only(chosen, rejected):
                notices.add("left out, since the two dialogues do not part at their last answer", record.place)
                continue
            fields = {"question": chosen[:-1], "answer": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
            rows.append(Record(record.place, {**record.fields, **fields}))
        notices.warn(len(records))
        return rows

    def _turns(self, record: Record, column: str, argument: str) -> list[Message]:
        text = require(record, column, argument)
        if not isinstance(text, str):
            raise UsageError(f"{record.place}, field '{column}': the dialogue is {quoted(text)}, not a text")
        return split_turns(text, self.user, self.assistant)


def _differ_in_last_answer_only(chosen: list[Message], rejected: list[Message]) -> bool:
    last_roles = [message["role"] for message in (*chosen[-2:], *rejected[-2:])]
    return last_roles == ["user", "assistant"] * 2 and chosen[:-1] == rejected[:-1]


class Each(Layout):
    """A list per row, each entry of which becomes a row, as the completions of UltraFeedback.

    The entry replaces the list: with ``column: completions``, its fields are ``completions.response`` and so on. The
    other columns are repeated.

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
    r"""Columns with JSON escapes, such as ``\"`` and ``\u00a3``, which are decoded; other backslashes are kept.

    Args:
        columns: Columns to decode.
    """

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [
            Record(row.place, {**row.fields, **{name: self._decoded(row, name) for name in self.columns}})
            for row in records
        ]

    def _decoded(self, record: Record, column: str) -> str:
        text = require(record, column, "layout.columns")
        if not isinstance(text, str):
            raise UsageError(f"{record.place}, field '{column}': {quoted(text)} is not a text")
        return _ESCAPE.sub(_decode_escape, text)


def _decode_escape(match: re.Match[str]) -> str:
    """Decodes an escape, or a run of ``\\u`` escapes, which may hold surrogate pairs; lone surrogates become U+FFFD."""
    text: str = json.loads(f'"{match[0]}"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Pattern(Layout):
    """A text field that a regular expression splits; each named group becomes a column.

    Args:
        field: Field to split.
        pattern: Pattern of the whole field, e.g. ``Q: (?P<question>.*)\\nA: (?P<answer>.*)\\nTrue:``. A dot also
            matches line ends.

    Raises:
        UsageError: The pattern is no regular expression, or has no named group.
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
        match = self.pattern.fullmatch(str(value))
        if match is None:
            raise UsageError(
                f"{record.place}, field '{self.field}': {str(value)[:80]!r} is not like {self.pattern.pattern!r}"
            )
        return match.groupdict(default="")


class Replies(Layout):
    """One message per row, with the id of the message it replies to, as in OpenAssistant.

    Each rated assistant message becomes a row with the columns ``context`` (the earlier messages in order, as
    ``{"role": ..., "text": ...}``), ``response``, and ``ratings`` and ``counts`` by attribute name. Messages without
    ratings, or with earlier messages missing from the table, are dropped.
    """

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        messages = {str(require(record, "message_id", "layout")): record for record in records}
        rows = []
        for record in records:
            names = find(record.fields, "labels.name")
            if require(record, "role", "layout") != "assistant" or not names:
                continue
            context = _context(record, messages)
            if context is None:
                continue
            fields = {
                "context": context,
                "response": require(record, "text", "layout"),
                "ratings": _by_name(record, names, "value"),
                "counts": _by_name(record, names, "count"),
            }
            rows.append(Record(record.place, {**record.fields, **fields}))
        return rows


def _by_name(record: Record, names: Any, field: str) -> dict[str, Any]:
    """Entries of ``labels.<field>`` by attribute name."""
    values = find(record.fields, f"labels.{field}")
    same_length = isinstance(names, list) and isinstance(values, list) and len(names) == len(values)
    if not same_length or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"{record.place}, field 'labels.{field}': {quoted(values)} is no list with an entry for each of "
            f"'labels.name', {quoted(names)}"
        )
    return dict(zip(names, values, strict=True))


def _context(record: Record, messages: dict[str, Record]) -> list[dict[str, Any]] | None:
    """Conversation before a message; None if one of its messages is not in the table."""
    context: list[dict[str, Any]] = []
    seen_ids: set[str] = set()
    message = record
    while (parent := require(message, "parent_id", "layout")) is not None:
        if str(parent) in seen_ids:
            raise UsageError(f"{record.place}, field 'parent_id': message {quoted(parent)} replies to itself")
        seen_ids.add(str(parent))
        if str(parent) not in messages:
            return None
        message = messages[str(parent)]
        context.insert(0, {name: require(message, name, "layout") for name in ("role", "text")})
    return context


@dataclass
class Verdict:
    """Column that says which of two answers is better.

    Args:
        column: Column with a number, or with a list of numbers of several raters, which are averaged.
        dimensions: Dimensions that it compares; empty = all.
        tie: Number that stands for a tie; the first answer is better below it, the second above it.
        graded: Whether the distance from ``tie`` is the margin.
    """

    column: str
    dimensions: list[str] = field(default_factory=list)
    tie: float = 0.0
    graded: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.tie):
            raise UsageError(f"layout.verdicts: the tie of '{self.column}' is {self.tie}: give a finite number")

    def lead(self, record: Record) -> float:
        """Returns the lead of the second answer over the first: negative if the first is better, 0 for a tie."""
        value = require(record, self.column, "layout.verdicts")
        ratings = [entry for entry in (value if isinstance(value, list) else [value]) if not is_missing(entry)]
        try:
            numbers = list(map(as_number, ratings))
        except UsageError as error:
            raise UsageError(f"{record.place}, field '{self.column}': {error}") from None
        tie = Decimal(repr(float(self.tie)))
        return float(sum(numbers, Decimal()) / len(numbers) - tie) if numbers else 0.0


class SideBySide(Layout):
    """Two answers per row, each of which becomes a row; an answer that a verdict prefers is compared with the other.

    The new rows have the columns ``answer``, ``rejected`` (null if no verdict prefers the answer),
    ``comparison_dimensions`` (of the verdicts that prefer it; empty = all), ``margin``, and the others in ``first`` and
    ``second``. An answer that no verdict prefers and that has no other column is dropped.

    Args:
        first: Field of the first answer by new column, e.g. ``{answer: response_0, safe: is_response_0_safe}``.
        second: The same for the second answer.
        verdicts: Columns that say which answer is better.
    """

    def __init__(self, first: dict[str, str], second: dict[str, str], verdicts: list[Verdict]) -> None:
        for name, columns in (("first", first), ("second", second)):
            if "answer" not in columns:
                raise UsageError(f"layout.{name} is {columns}: it must say which field is the `answer`")
        self.answers = {"first": first, "second": second}
        self.verdicts = verdicts

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [row for record in records for row in self._answer_rows(record)]

    def _answer_rows(self, record: Record) -> list[Record]:
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
        self, record: Record, which: str, columns: dict[str, object], other_answer: object, leads: list[float]
    ) -> Record | None:
        won = [(verdict, lead) for verdict, lead in zip(self.verdicts, leads, strict=True) if lead > 0]
        if not won and len(columns) == 1:
            return None
        margins = [lead for verdict, lead in won if verdict.graded]
        all_dimensions = any(not verdict.dimensions for verdict, _ in won)
        comparison = {
            "rejected": other_answer if won else None,
            "comparison_dimensions": [] if all_dimensions else [d for verdict, _ in won for d in verdict.dimensions],
            "margin": sum(margins) / len(margins) if margins else 0.0,
        }
        return Record(f"{record.place}, {which} answer", {**record.fields, **columns, **comparison})
