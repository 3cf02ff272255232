"""Prompts of which exactly one of several answers fits: the embedded world's best-of-n evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from moslim.workbench.grammar import LEVELS, QUESTIONS, Topic
from moslim.workbench.questions import ask
from moslim.workbench.writing import MAX_LEVEL, draw_levels, reachable, write_answer

ANSWERS = 4


def best_of_records(
    topics: Sequence[Topic], count: int, rng: random.Random, paraphrases: int = 2
) -> list[dict[str, Any]]:
    """Draws prompts in the format of :func:`moslim.reward.evaluation.choices.read_choices`.

    A preference names one or two dimensions. Four answers are written, of different levels on these and of any on the
    others, so that exactly one has the levels asked for. A paraphrase is another form of the question.

    Args:
        topics: What to ask about.
        count: Number of prompts.
        rng: Source of randomness.
        paraphrases: Other forms of each question, at most three.
    """
    records = []
    for _ in range(count):
        topic = rng.choice(topics)
        asked, *others = rng.sample(range(len(QUESTIONS)), 1 + paraphrases)
        options = _options(rng.sample(list(LEVELS), rng.choice((1, 2))), rng)
        right = rng.randrange(ANSWERS)
        records.append(
            {
                "question": ask(topic, asked),
                "paraphrases": [ask(topic, form) for form in others],
                "answers": [_answer(topic, levels, rng) for levels in options],
                "preference": options[right],
                "right": right,
            }
        )
    return records


def _options(names: Sequence[str], rng: random.Random) -> list[dict[str, int]]:
    """Different levels of the named dimensions, each reachable, as many as there are answers."""
    found: list[dict[str, int]] = []
    while len(found) < ANSWERS:
        levels = {name: rng.randint(0, MAX_LEVEL) for name in names}
        if reachable(levels) and levels not in found:
            found.append(levels)
    return found


def _answer(topic: Topic, levels: dict[str, int], rng: random.Random) -> str:
    return write_answer(topic, draw_levels({name: (level,) for name, level in levels.items()}, rng), rng)
