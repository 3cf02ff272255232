"""Chats and texts as token ids, so that nothing in a text can be read as a control token or a turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from moslim.data.markers import Control, normaliser, pieces, render
from moslim.data.neutralise import ForbiddenText, Neutraliser
from moslim.data.types import Message, Question
from moslim.errors import UsageError

Frame = tuple[list[int], list[int]]
"""Special ids before a text, and between two texts."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of a single byte, as tokenizers with byte fallback name it."""


class ChatEncoder:
    """Makes ids of chats and texts.

    Strings that read as a control token, as a turn of the chat template or as an instruction are taken out first. Then
    the ids are looked at: where a text still gives a special or control id, it is encoded piece by piece without it; so
    is the name of a byte, such as ``<0x0A>``, where the tokenizer would take it for that byte.

    Args:
        tokenizer: The tokenizer.
        frame: Special ids that stand around texts where there is no chat template.
        instruction: What reads as an instruction.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, frame: Frame, instruction: Sequence[ForbiddenText] = ()
    ) -> None:
        self.tokenizer = tokenizer
        control = Control.of(tokenizer)
        self._forbidden = control.ids
        self._normalise = normaliser(tokenizer)
        self._neutraliser = Neutraliser([*control.patterns, *instruction], self._normalise)
        self._frame = frame
        self._system_role: bool | None = None
        self._written: dict[tuple[str, ...], list[int]] = {}
        byte = tokenizer.get_vocab().get("<0x0A>")
        self._takes_bytes = byte is not None and byte in self._ids("<0x0A>")

    def clean(self, text: str) -> str:
        """Returns a text without what is taken out."""
        return self._neutraliser.text(text)

    def question(self, question: Question) -> Question:
        """Applies :meth:`clean` to a question, or to the content of each of its messages."""
        if isinstance(question, str):
            return self.clean(question)
        return [{"role": message["role"], "content": self.clean(message["content"])} for message in question]

    @property
    def least(self) -> int:
        """Characters that must be left of a turn: 1 where the template refuses an empty one."""
        if self.tokenizer.chat_template is None:
            return 0
        try:
            render(self.tokenizer, [{"role": "user", "content": ""}])
        except UsageError:
            return 1
        return 0

    def fit_roles(self, messages: list[Message]) -> list[Message]:
        """Moves a leading system message into the first user turn where the template has no system role."""
        if messages[0]["role"] != "system" or self.tokenizer.chat_template is None or self._has_system_role:
            return messages
        system, first, *rest = messages
        return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def render(self, messages: list[Message]) -> str:
        """Returns a chat as text, up to the point where the answer begins.

        Without a chat template, the contents stand one per line.

        Raises:
            UsageError: The template refuses the messages, or does not show one of them.
        """
        if self.tokenizer.chat_template is None:
            return "".join(f"{message['content']}\n" for message in messages)
        messages = self.fit_roles(messages)
        text = render(self.tokenizer, messages)
        self._control_ids_of(messages)
        return text

    def prompt(self, messages: list[Message]) -> list[int]:
        """Returns the ids of a chat of cleaned contents, up to the point where the answer begins.

        Without a chat template, the contents stand one per line, between the special ids of the ``frame``.

        Raises:
            UsageError: The template refuses the messages, or does not show one of them.
        """
        text = self.render(messages)
        if self.tokenizer.chat_template is None:
            before, after = self._frame
            return [*before, *self.texts([text])[0], *after]
        ids = self._ids(text)
        messages = self.fit_roles(messages)
        named = any(self._names_bytes(message["content"]) for message in messages)
        if not named and self._control_ids(ids) == self._control_ids_of(messages):
            return ids
        parts = pieces(self.tokenizer, [message["role"] for message in messages])
        spans = [
            self._ids(part) if isinstance(part, str) else self._safe(messages[part]["content"])
            for part in parts
            if part != ""
        ]
        return [i for span in spans for i in span]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of cleaned texts, tokenised together; none is special or a control token."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [row if self._is_plain(text, row) else self._safe(text) for text, row in zip(texts, rows, strict=True)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _safe(self, text: str) -> list[int]:
        """Ids of a text, halved until no part gives a forbidden one; single characters that do are left out."""
        result: list[int] = []
        waiting = [text]
        while waiting:
            part = waiting.pop()
            ids = self._ids(part)
            if self._is_plain(part, ids):
                result += ids
            elif len(part) > 1:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            else:
                result += [i for i in ids if i not in self._forbidden]
        return result

    def _is_plain(self, text: str, ids: Sequence[int]) -> bool:
        return self._forbidden.isdisjoint(ids) and not self._names_bytes(text)

    def _names_bytes(self, text: str) -> bool:
        """Whether the tokenizer would take some characters, such as ``<0x0A>``, for the byte that they name."""
        if not self._takes_bytes:
            return False
        return _BYTE.search(text if self._normalise is None else self._normalise(text)) is not None

    def _control_ids(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._forbidden]

    def _control_ids_of(self, messages: list[Message]) -> list[int]:
        """The control ids that the template itself writes around such messages, in order.

        Raises:
            UsageError: It does not show one of the messages.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._written:
            parts = pieces(self.tokenizer, roles)
            for number, role in enumerate(roles):
                if number not in parts:
                    raise UsageError(
                        f"the tokenizer's chat template does not show message {number}, a {role} turn, of a chat with "
                        f"roles {list(roles)}: leave it out of the row, or set another tokenizer.chat_template"
                    )
            self._written[roles] = self._control_ids(
                self._ids("".join(p if isinstance(p, str) else "a" for p in parts))
            )
        return self._written[roles]

    @property
    def _has_system_role(self) -> bool:
        """Whether the chat template shows system messages: some refuse them, some drop them silently."""
        if self._system_role is None:
            try:
                self._system_role = 0 in pieces(self.tokenizer, ["system", "user"])
            except UsageError:
                self._system_role = False
        return self._system_role


def without_start(
    messages: list[Message], characters: int | None, least: int = 0, system: bool = False
) -> list[Message]:
    """Drops characters from the start of the chat; turns stay.

    Args:
        messages: The chat.
        characters: How many; None = all.
        least: Characters that each message keeps, white space at its end aside.
        system: Whether system messages are cut, too.
    """
    result = []
    for message in messages:
        content = message["content"]
        most = max(0, len(content.rstrip()) - least) if least else len(content)
        cut = 0 if message["role"] == "system" and not system else most
        if characters is not None:
            cut = min(characters, cut)
            characters -= cut
        result.append({"role": message["role"], "content": content[cut:]})
    return result
