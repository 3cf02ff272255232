"""Asking about a topic, and finding the topic that was asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moslim.data.types import Question
from moslim.workbench.grammar import QUESTIONS, STYLE_REQUEST, TOPICS, Topic

_BY_THING = {topic.thing: topic for topic in TOPICS}


def ask(topic: Topic, form: int, style_words: Sequence[str] = ()) -> str:
    """Writes a question.

    Args:
        topic: What to ask about.
        form: Which of the forms in ``grammar.QUESTIONS``.
        style_words: Loose style words to add, e.g. ``["short", "friendly"]``.
    """
    question = QUESTIONS[form].format(verb=topic.verb, thing=topic.thing)
    if style_words:
        question += " " + STYLE_REQUEST.format(words=" and ".join(style_words))
    return question


def topics_in(text: str) -> list[Topic]:
    """The topics that a text names, in its order; one that is named twice is there twice."""
    return [_BY_THING[word] for word in re.findall(r"[a-z]+", text.casefold()) if word in _BY_THING]


def topic_of(question: Question) -> Topic | None:
    """The topic that a question, or the last user turn of a chat, names; None where it names none."""
    if not isinstance(question, str):
        question = next((m["content"] for m in reversed(question) if m["role"] == "user"), "")
    return next(iter(topics_in(question)), None)
