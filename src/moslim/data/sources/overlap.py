"""Questions that are asked in training and in a held-out part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

from moslim.data.prompts import as_messages
from moslim.data.sources.records import Record
from moslim.data.types import Example, Question
from moslim.errors import UsageError

SharedQuestions = Literal["warn", "drop", "error"]


def question_key(question: Question) -> str:
    """Returns what is equal for questions that differ in case or white space only; a chat of one turn is its text."""
    messages = as_messages(question)
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return " ".join((messages[0]["content"] if len(messages) == 1 else text).casefold().split())


def without_shared(
    held_out: list[tuple[str, Record]], training: Mapping[str, Record], policy: SharedQuestions
) -> list[Record]:
    """Looks for held-out rows whose question training has, too: what is measured on them is no surprise.

    Args:
        held_out: Key and row of each held-out row.
        training: A training row by key.
        policy: What is done about shared questions: the rows are kept, or dropped, with a warning, or are an error.

    Returns:
        The held-out rows that stay.

    Raises:
        UsageError: There are shared questions, and ``policy`` is ``error``.
    """
    shared = [(key, row) for key, row in held_out if key in training]
    if not shared:
        return [row for _, row in held_out]
    key, row = shared[0]
    message = (
        f"{len(shared)} of {len(held_out)} held-out rows ask {len({key for key, _ in shared})} questions that training "
        f"has, too, e.g. {key[:80]!r} ({row.place}; {training[key].place})"
    )
    if policy == "error":
        raise UsageError(f"{message}; `shared_questions: drop` leaves these held-out rows out")
    warnings.warn(f"{message}; they are {'left out' if policy == 'drop' else 'kept'}", stacklevel=4)
    return [row for key, row in held_out if policy == "warn" or key not in training]


def warn_if_shared(held_out: Sequence[Example], training: Sequence[Example]) -> None:
    """Warns of held-out rows of one source whose question another source has in training."""
    known = {question_key(row.question) for row in training}
    shared = [key for key in (question_key(row.question) for row in held_out) if key in known]
    if shared:
        warnings.warn(
            f"{len(shared)} of {len(held_out)} held-out rows ask {len(set(shared))} questions that another source "
            f"trains on, e.g. {shared[0][:80]!r}; they are kept",
            stacklevel=3,
        )
