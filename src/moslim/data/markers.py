"""What only the chat template and the trainer may write into a prompt: control tokens and markers of turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moslim import template_limits
from moslim.data.neutralise import ForbiddenText
from moslim.data.types import Message
from moslim.errors import UsageError

_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, TypeError, ValueError),
)
"""What a chat template raises that refuses messages, or that is wrong."""

_ENDLESS: list[Any] = []
"""Chat templates that did not end in time: they are not tried again."""

_PROBES = ("system user", "user", "system user assistant user", "user assistant user assistant user")
"""Roles of the chats from which the markers of turns are read off."""

_BRACKETED = re.compile(r"<+[^<>\n]{1,40}>+|\[+[^\[\]\n]{1,40}\]+|\{+[^{}\n]{1,40}\}+|｜[^｜\n]{1,40}｜")  # noqa: RUF001
_REASONING = re.compile(r"</?(think|thinking|thought|reasoning)>")
_LONGEST_MARKER = 4
"""Most words of a marker that no sign sets apart from ordinary text."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Returns a chat as the tokenizer's template writes it, up to the point where the answer begins.

    Raises:
        UsageError: The template refuses the messages, or did not end for some.
    """
    endless = UsageError(
        f"the tokenizer's chat template does not end: for a chat it takes more than {template_limits.SECONDS} seconds; "
        "take another tokenizer, or mend its chat_template"
    )
    if tokenizer.chat_template in _ENDLESS:
        raise endless
    try:
        with template_limits.time_limit(template_limits.SECONDS):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TimeoutError:
        _ENDLESS.append(tokenizer.chat_template)
        raise endless from None
    except _TEMPLATE_ERRORS as error:
        roles = [message["role"] for message in messages]
        reason = str(error) or type(error).__name__
        twice = next((role for role, other in pairwise(roles) if role == other), None)
        remedy = "leave the row out" if twice is None else f"join the {twice} turns that follow each other"
        raise UsageError(
            f"the tokenizer's chat template refuses messages with roles {roles}: {reason}; {remedy}, or set another "
            "tokenizer.chat_template"
        ) from error


def pieces(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str | int]:
    """Returns what the template writes around the messages of a chat, and their numbers where their contents stand.

    Raises:
        UsageError: The template refuses such a chat.
    """
    messages = [{"role": role, "content": f"zqxprobe{i}zqx"} for i, role in enumerate(roles)]
    parts = re.split(r"zqxprobe(\d+)zqx", render(tokenizer, messages))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


@dataclass(frozen=True)
class Control:
    """What a text must not hold.

    Args:
        ids: Ids of special and control tokens. That of an unknown word is none of them.
        patterns: These tokens' strings, and the markers of turns that the chat template writes in plain text.
    """

    ids: frozenset[int]
    patterns: tuple[ForbiddenText, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Control:
        """Reads it off the tokenizer and its chat template."""
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
    """Returns the tokenizer's own normaliser of texts; None where it has none, or is not a fast one."""
    own = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return None if own is None else own.normalize_str


def special_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All strings that the tokenizer turns into a special token."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """What the template writes around turns, and whether a turn stands before it; the first piece has none."""
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
    """Special tokens, and added ones that look like control tokens: ``<|...|>``, or bracketed and in the template."""
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
    """Markers of turns in what the template writes between two turns, or, if not ``whole``, before the first one.

    Of the latter only the end counts: there may be a preamble or a default system message before it.
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
