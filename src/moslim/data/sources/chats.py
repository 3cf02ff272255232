"""From the ways in which tables write a conversation to messages."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

from moslim.data.types import Message, Question
from moslim.errors import UsageError


class ChatFormat(ABC):
    """How the question column writes the chat so far. Subclass it, and name the subclass under ``source.chat``."""

    @abstractmethod
    def question(self, value: Any) -> Question:
        """Returns the question as text or messages.

        Raises:
            UsageError: The value is not written in this way.
        """


class Turns(ChatFormat):
    """One text with a marker before each turn; text before the first marker is a user turn.

    Args:
        user: Marker of a user turn, e.g. ``"\\n<extra_id_1>User\\n"``.
        assistant: Marker of an assistant turn.
    """

    def __init__(self, user: str, assistant: str) -> None:
        self.user = user
        self.assistant = assistant

    def question(self, value: Any) -> Question:
        """Returns the turns as messages, or the text itself where it has no marker."""
        if not isinstance(value, str):
            raise UsageError(f"the chat is {value!r}, not a text with turns")
        return split_turns(value, self.user, self.assistant) if self.user in value or self.assistant in value else value


class Messages(ChatFormat):
    """A list of objects, one per turn, under other names than ``role`` and ``content``.

    Args:
        role: Field of the role.
        content: Field of the text.
        roles: The usual name (``user``, ``assistant``, ``system``) of each role that is called otherwise.
    """

    def __init__(self, role: str = "role", content: str = "content", roles: dict[str, str] | None = None) -> None:
        self.role = role
        self.content = content
        self.roles = roles or {}

    def question(self, value: Any) -> Question:
        """Returns the turns as messages."""
        if not isinstance(value, list):
            raise UsageError(f"the chat is {value!r}, not a list of turns")
        absent = [turn for turn in value if not {self.role, self.content} <= set(turn)]
        if absent:
            raise UsageError(f"the turn {absent[0]} lacks '{self.role}' or '{self.content}'")
        return [
            {"role": self.roles.get(turn[self.role], turn[self.role]), "content": turn[self.content]} for turn in value
        ]


def split_turns(text: str, user: str, assistant: str) -> list[Message]:
    """Cuts a dialogue at the markers of its turns; white space around a turn is left out."""
    opening, *rest = re.split(f"({re.escape(user)}|{re.escape(assistant)})", text)
    turns = [{"role": "user", "content": opening.strip()}] if opening.strip() else []
    for marker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if marker == user else "assistant", "content": content.strip()})
    return turns
