"""Reading of conversations and of comparisons (rejected answer, dimensions, margin) from the fields of a row."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from moslim.data.sources.labels import check_names, is_missing
from moslim.data.sources.records import Record, parse_json, require
from moslim.data.types import Message, Question
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError, as_number, quoted

_CHAT_TEXT = re.compile(r"""\s*\[?\s*\{\s*(["'])(role|content|from|value|messages|conversations?)\1\s*:""")
_PAIRS = re.compile(r"""\s*\[\s*[\[(]\s*(["'])(system|user|assistant|human|gpt|bot)\1\s*,""", re.IGNORECASE)
_TWICE = re.compile(r"""\s*"\s*(\[\s*)?\{\s*\\\"""")
_LIST = re.compile(r"\s*\[\s*\{")
_TURNS = ({"role", "content"}, {"role", "text"}, {"from", "value"}, {"speaker", "text"})
"""Sets of fields by which a JSON object is recognised as a turn."""


class ChatFormat(ABC):
    """Format of the conversation in the question column.

    Subclass it, and name the subclass under ``source.chat``.
    """

    @abstractmethod
    def question(self, value: Any) -> Question:
        """Returns the question as text or messages.

        Raises:
            UsageError: The value is not in this format.
        """


class PlainText(ChatFormat):
    """Text that is one user turn, even if it is JSON with roles."""

    def question(self, value: Any) -> Question:
        """Returns the text unchanged."""
        if not isinstance(value, str):
            raise UsageError(f"the question is {quoted(value)}, not a text")
        return value


class Turns(ChatFormat):
    """Text with a marker before each turn; text before the first marker is a user turn.

    Args:
        user: Marker of a user turn, e.g. ``"\\n<extra_id_1>User\\n"``.
        assistant: Marker of an assistant turn.
    """

    def __init__(self, user: str, assistant: str) -> None:
        self.user = user
        self.assistant = assistant

    def question(self, value: Any) -> Question:
        """Returns the turns as messages, or the text itself if it has no marker."""
        if not isinstance(value, str):
            raise UsageError(f"the chat is {quoted(value)}, not a text with turns")
        return split_turns(value, self.user, self.assistant) if self.user in value or self.assistant in value else value


class Messages(ChatFormat):
    """List of objects, one per turn, with other field names than ``role`` and ``content``; a text is parsed as JSON.

    Args:
        role: Field of the role.
        content: Field of the text.
        roles: Standard name (``user``, ``assistant``, ``system``) of each role with another name.
    """

    def __init__(self, role: str = "role", content: str = "content", roles: dict[str, str] | None = None) -> None:
        self.role = role
        self.content = content
        self.roles = roles or {}

    def question(self, value: Any) -> Question:
        """Returns the turns as messages."""
        turns = value
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            turns = parse_json(value, "the chat")[0]
        if not isinstance(turns, list):
            raise UsageError(f"the chat is {quoted(value)}, not a list of turns")
        incomplete = [
            turn for turn in turns if not isinstance(turn, dict) or not {self.role, self.content} <= set(turn)
        ]
        if incomplete:
            raise UsageError(f"the turn {quoted(incomplete[0])} lacks '{self.role}' or '{self.content}'")
        unknown = [turn[self.role] for turn in turns if not isinstance(turn[self.role], str)]
        if unknown:
            raise UsageError(f"the role {quoted(unknown[0])} is not a text")
        return [
            {"role": self.roles.get(turn[self.role], turn[self.role]), "content": turn[self.content]} for turn in turns
        ]


def looks_like_chat(text: str) -> bool:
    """Whether a text begins like a chat in JSON, or is a JSON list of turns."""
    return _CHAT_TEXT.match(text) is not None or (_LIST.match(text) is not None and _is_list_of_turns(text))


def _is_list_of_turns(text: str) -> bool:
    try:
        turns = parse_json(text, "")[0]
    except UsageError:
        return False
    return all(isinstance(turn, dict) and any(fields <= turn.keys() for fields in _TURNS) for turn in turns)


def chat_in_text(value: Any) -> Any:
    """Parses a chat that is stored as JSON in a text, e.g. in a cell of a CSV file; returns other values unchanged.

    Raises:
        UsageError: The text looks like a chat but cannot be parsed as one.
    """
    if not isinstance(value, str):
        return value
    if _PAIRS.match(value) or _TWICE.match(value):
        form = "JSON written as JSON once more" if _TWICE.match(value) else "lists of role and text"
        raise UsageError(
            f"the question {quoted(value)} looks like a chat in {form}: write it with json.dumps as a list of objects "
            "with `role` and `content`, or, if it is a plain text, set `chat` to moslim.data.PlainText"
        )
    if not looks_like_chat(value):
        return value
    try:
        chat, end = parse_json(value, "a chat in a text", whole=False)
    except UsageError as error:
        raise UsageError(
            f"{error}; the question {quoted(value)} looks like a chat: write it with json.dumps, or, if it is a plain "
            "text, set `chat` to moslim.data.PlainText"
        ) from None
    if value[end:].strip():  # plain text that begins with JSON
        return value
    if not isinstance(chat, list):
        raise UsageError(
            f"the question {quoted(value)} is a JSON object, not a list of turns; if it is a plain text, set `chat` "
            "to moslim.data.PlainText"
        )
    return chat


def split_turns(text: str, user: str, assistant: str) -> list[Message]:
    """Splits a dialogue at the markers of its turns and strips the turns."""
    opening, *rest = re.split(f"({re.escape(user)}|{re.escape(assistant)})", text)
    turns = [{"role": "user", "content": opening.strip()}] if opening.strip() else []
    for marker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if marker == user else "assistant", "content": content.strip()})
    return turns


class Comparison(NamedTuple):
    """Fields of an :class:`~moslim.data.Example` that compare two answers; by default, no comparison."""

    rejected: str | None = None
    comparison_dimensions: tuple[str, ...] = ()
    margin: float = 0.0


class Comparisons:
    """Reader of the comparison in a row; the arguments are those of :class:`~moslim.data.Table`."""

    def __init__(self, rejected: str | None, comparison_dimensions: str | list[str] | None, margin: str | None) -> None:
        if rejected is None and (comparison_dimensions or margin):
            raise UsageError("comparison_dimensions and margin say more about a `rejected` answer: name its column")
        self.rejected = rejected
        self.comparison_dimensions = comparison_dimensions or []
        self.margin = margin

    def check(self, preferences: PreferenceSet) -> None:
        """Checks the names in ``comparison_dimensions``.

        Raises:
            UsageError: A dimension is unknown.
        """
        check_names(
            "data.source.comparison_dimensions",
            [] if isinstance(self.comparison_dimensions, str) else self.comparison_dimensions,
            preferences,
        )

    def read(self, record: Record, preferences: PreferenceSet) -> Comparison:
        """Returns the comparison of a row.

        Raises:
            UsageError: A column is missing, or its value is invalid.
        """
        if self.rejected is None:
            return Comparison()
        rejected = require(record, self.rejected, "rejected")
        if rejected is None:
            return Comparison()
        if not isinstance(rejected, str):
            raise UsageError(f"{record.place}, field '{self.rejected}': the answer is {quoted(rejected)}, not a text")
        return Comparison(rejected, self._dimensions(record, preferences), self._margin(record))

    def _dimensions(self, record: Record, preferences: PreferenceSet) -> tuple[str, ...]:
        if not isinstance(self.comparison_dimensions, str):
            return tuple(self.comparison_dimensions)
        names = require(record, self.comparison_dimensions, "comparison_dimensions")
        if not isinstance(names, list) or not all(isinstance(n, str) and n in preferences.names for n in names):
            raise UsageError(
                f"{record.place}, field '{self.comparison_dimensions}': {quoted(names)} is no list of dimensions; "
                f"there are: {', '.join(preferences.names)}"
            )
        return tuple(names)

    def _margin(self, record: Record) -> float:
        if self.margin is None:
            return 0.0
        value = require(record, self.margin, "margin")
        margins = [entry for entry in (value if isinstance(value, list) else [value]) if not is_missing(entry)]
        where = f"{record.place}, field '{self.margin}'"
        try:
            margin = float(sum(map(as_number, margins)) / len(margins)) if margins else 0.0
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        if margin < 0:
            raise UsageError(f"{where}: value {quoted(value)} prefers the rejected answer")
        return margin
