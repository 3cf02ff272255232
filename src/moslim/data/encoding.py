"""Encoding of chats and texts as token ids.

Only the chat template and the instruction may write control tokens and markers of turns. :class:`Control` finds these
for a tokenizer, and :class:`ChatEncoder` keeps them out of texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moslim.data import chat_templates
from moslim.data.sanitizing import ForbiddenText, TextSanitizer
from moslim.data.types import Message, Question
from moslim.utils.errors import UsageError

_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, TypeError, ValueError),
)
"""Errors of a chat template that refuses messages or is faulty."""

_ENDLESS: list[Any] = []
"""Chat templates that exceeded the time limit and are not run again."""

_PROBES = ("system user", "user", "system user assistant user", "user assistant user assistant user")
"""Roles of the probe chats, whose rendering shows the markers of turns."""

_BRACKETED = re.compile(r"<+[^<>\n]{1,40}>+|\[+[^\[\]\n]{1,40}\]+|\{+[^{}\n]{1,40}\}+|｜[^｜\n]{1,40}｜")  # noqa: RUF001
_REASONING = re.compile(r"</?(think|thinking|thought|reasoning)>")
_LONGEST_MARKER = 4
"""Most words in a marker of turns without brackets."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Returns a chat as rendered by the tokenizer's template, up to the start of the answer.

    Raises:
        UsageError: The template refuses the messages or exceeds the time limit.
    """
    endless = UsageError(
        f"the tokenizer's chat template does not end: for a chat it takes more than {chat_templates.SECONDS} seconds; "
        "take another tokenizer, or mend its chat_template"
    )
    if tokenizer.chat_template in _ENDLESS:
        raise endless
    try:
        with chat_templates.time_limit(chat_templates.SECONDS):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TimeoutError:
        _ENDLESS.append(tokenizer.chat_template)
        raise endless from None
    except _TEMPLATE_ERRORS as error:
        roles = [message["role"] for message in messages]
        reason = str(error) or type(error).__name__
        repeated = next((role for role, following in pairwise(roles) if role == following), None)
        remedy = "leave the row out" if repeated is None else f"join the {repeated} turns that follow each other"
        raise UsageError(
            f"the tokenizer's chat template refuses messages with roles {roles}: {reason}; {remedy}, or set another "
            "tokenizer.chat_template"
        ) from error


def pieces(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str | int]:
    """Returns the rendering of a chat: texts written by the template, and message indices in place of contents.

    Raises:
        UsageError: The template refuses such a chat.
    """
    messages = [{"role": role, "content": f"zqxprobe{i}zqx"} for i, role in enumerate(roles)]
    parts = re.split(r"zqxprobe(\d+)zqx", render(tokenizer, messages))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@dataclass(frozen=True)
class Control:
    """Control tokens and markers of turns, which no text may contain.

    Args:
        ids: Ids of special and control tokens, without the id of unknown words.
        patterns: Strings of these tokens, and markers of turns that the chat template writes as plain text.
    """

    ids: frozenset[int]
    patterns: tuple[ForbiddenText, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Control:
        """Returns the control tokens and markers of a tokenizer and its chat template."""
        probes = list(_probes(tokenizer))
        tokens = _control_tokens(tokenizer, probes)
        ids = {i for i in map(tokenizer.convert_tokens_to_ids, tokens) if isinstance(i, int)}
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown not in {tokenizer.eos_token_id, tokenizer.bos_token_id}:
            ids -= {unknown}
        normalise = normaliser(tokenizer)
        normal = {normalise(token) for token in tokens} if normalise else set()
        strings = tokens | {text for text in normal if len(text) > 2 and not text.isalnum()}
        markers = [marker for before, piece in probes for marker in _markers(piece, tokens, whole=before)]
        return cls(frozenset(ids), (*map(ForbiddenText, sorted(strings)), *dict.fromkeys(markers)))


def normaliser(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str] | None:
    """Returns the text normaliser of a fast tokenizer; None if there is none."""
    backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return None if backend is None else backend.normalize_str


def special_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Returns all strings that the tokenizer encodes as a special token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """Yields each text that the template writes around turns, with a flag that is false before the first turn."""
    if tokenizer.chat_template is None:
        return
    for roles in _PROBES:
        try:
            parts = pieces(tokenizer, roles.split())
        except UsageError:  # e.g. a template without system role
            continue
        for i, part in enumerate(parts):
            if isinstance(part, str) and part:
                yield i > 0, part


def _control_tokens(tokenizer: PreTrainedTokenizerBase, probes: list[tuple[bool, str]]) -> set[str]:
    """Returns special tokens, and added tokens like ``<|...|>`` or with brackets and in the template."""
    special = special_strings(tokenizer)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} - special
    written = "\n".join(piece for _, piece in probes)
    template = "" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    for token in added:
        name = token.strip()
        bracketed = _BRACKETED.fullmatch(name) is not None
        marked = re.fullmatch(r"<[|｜].+[|｜]>", name) is not None  # noqa: RUF001
        in_source = name in template and not _REASONING.fullmatch(name)
        if marked or (bracketed and (name in written or in_source)):
            special.add(token)
    return {token for token in special if token.strip()}


def _markers(piece: str, tokens: set[str], whole: bool) -> Iterator[ForbiddenText]:
    """Yields the markers of turns in a text that the template writes.

    Args:
        piece: Text between two turns or before the first one.
        tokens: Control tokens, which are no markers.
        whole: Whether to search the whole text. Before the first turn, only the end is searched, since a preamble or a
            default system message may precede it.
    """
    if not whole:
        piece = re.split(r"\n|(?<=[.!?])\s", piece.rstrip())[-1]
    known = sorted(tokens, key=len, reverse=True)
    chunks = re.split("|".join(map(re.escape, known)), piece) if known else [piece]
    for number, chunk in enumerate(chunks):
        for line_number, line in enumerate(chunk.splitlines()):
            for bracketed in _BRACKETED.findall(line):
                if any(character.isalnum() for character in bracketed):
                    yield ForbiddenText(bracketed)
                if sum(character.isalnum() for character in bracketed) > 2:  # "a < s > b" is no "<s>"
                    yield ForbiddenText(bracketed, match="form")
            rest = _BRACKETED.sub(" ", line).strip()
            if not any(character.isalnum() for character in rest) or len(rest.split()) > _LONGEST_MARKER:
                continue
            if re.match(r"[^\w\s]{2}|[^\w\s]+\s", rest):  # "### User:", "**User**"
                yield ForbiddenText(rest)
                yield ForbiddenText(rest, match="form")
            elif not rest[-1].isalnum():  # "User:"
                yield ForbiddenText(rest, match="line")
                if whole and number == line_number == 0:  # in the middle of a line
                    yield ForbiddenText(rest, match="form", cased=True)


Frame = tuple[list[int], list[int]]
"""Special token ids before a text, and after it or between two texts."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""Token of a single byte in a tokenizer with byte fallback."""


class ChatEncoder:
    """Encodes chats and texts as token ids.

    :meth:`clean` removes strings that read as a control token, a turn of the chat template or an instruction. If a
    cleaned text still yields a control id, or names a byte that the tokenizer would decode (``<0x0A>``), it is split
    and encoded in parts without such ids.

    Args:
        tokenizer: Tokenizer of the model.
        frame: Special ids around texts, used without a chat template.
        instruction: Patterns that read as an instruction.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, frame: Frame, instruction: Sequence[ForbiddenText] = ()
    ) -> None:
        self.tokenizer = tokenizer
        control = Control.of(tokenizer)
        self._forbidden = control.ids
        self._normalise = normaliser(tokenizer)
        self._sanitizer = TextSanitizer([*control.patterns, *instruction], self._normalise)
        self._frame = frame
        self._system_role: bool | None = None
        self._written: dict[tuple[str, ...], list[int]] = {}
        byte = tokenizer.get_vocab().get("<0x0A>")
        self._takes_bytes = byte is not None and byte in self._ids("<0x0A>")

    def clean(self, text: str) -> str:
        """Returns a text without forbidden patterns."""
        return self._sanitizer.text(text)

    def question(self, question: Question) -> Question:
        """Applies :meth:`clean` to a question, or to the content of each of its messages."""
        if isinstance(question, str):
            return self.clean(question)
        return [{"role": message["role"], "content": self.clean(message["content"])} for message in question]

    @property
    def least(self) -> int:
        """Fewest characters of a turn: 1 if the template refuses an empty turn, else 0."""
        if self.tokenizer.chat_template is None:
            return 0
        try:
            render(self.tokenizer, [{"role": "user", "content": ""}])
        except UsageError:
            return 1
        return 0

    def fit_roles(self, messages: list[Message]) -> list[Message]:
        """Moves a leading system message into the first user turn if the template has no system role."""
        if messages[0]["role"] != "system" or self.tokenizer.chat_template is None or self._has_system_role:
            return messages
        system, first, *rest = messages
        return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def render(self, messages: list[Message]) -> str:
        """Returns a chat as text, up to the start of the answer; without a chat template, one content per line.

        Raises:
            UsageError: The template refuses the messages or omits one.
        """
        if self.tokenizer.chat_template is None:
            return "".join(f"{message['content']}\n" for message in messages)
        messages = self.fit_roles(messages)
        text = render(self.tokenizer, messages)
        self._control_ids_of(messages)
        return text

    def prompt(self, messages: list[Message]) -> list[int]:
        """Returns the token ids of a cleaned chat, up to the start of the answer.

        Without a chat template: one content per line, between the special ids of ``frame``.

        Raises:
            UsageError: The template refuses the messages or omits one.
        """
        text = self.render(messages)
        if self.tokenizer.chat_template is None:
            before, after = self._frame
            return [*before, *self.texts([text])[0], *after]
        ids = self._ids(text)
        messages = self.fit_roles(messages)
        names_bytes = any(self._names_bytes(message["content"]) for message in messages)
        if not names_bytes and self._control_ids(ids) == self._control_ids_of(messages):
            return ids
        parts = pieces(self.tokenizer, [message["role"] for message in messages])
        spans = [
            self._ids(part) if isinstance(part, str) else self._safe(messages[part]["content"])
            for part in parts
            if part != ""
        ]
        return [i for span in spans for i in span]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of cleaned texts, tokenised in one call; no id is special or a control token."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [
            ids if self._is_plain(text, ids) else self._safe(text) for text, ids in zip(texts, encoded, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _safe(self, text: str) -> list[int]:
        """Returns the ids of a text, halved until no part yields a forbidden id; such single characters are dropped."""
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
        """Whether the text names a byte, e.g. ``<0x0A>``, that the tokenizer would encode as this byte."""
        if not self._takes_bytes:
            return False
        return _BYTE.search(text if self._normalise is None else self._normalise(text)) is not None

    def _control_ids(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._forbidden]

    def _control_ids_of(self, messages: list[Message]) -> list[int]:
        """Returns the control ids that the template writes around messages with these roles, in order.

        Raises:
            UsageError: The template omits one of the messages.
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
        """Whether the chat template renders system messages; some templates refuse or silently drop them."""
        if self._system_role is None:
            try:
                self._system_role = 0 in pieces(self.tokenizer, ["system", "user"])
            except UsageError:
                self._system_role = False
        return self._system_role


def without_start(
    messages: list[Message], characters: int | None, least: int = 0, system: bool = False
) -> list[Message]:
    """Returns a chat without its first characters; all turns remain.

    Args:
        messages: Chat to cut.
        characters: Number of characters to drop; None = all.
        least: Characters that each message keeps, not counting white space at its end.
        system: Whether to cut system messages as well.
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
