"""The unlabelled text that the starter learns: chats in which loose style words are followed, most of the time.

What is not in it: an instruction, the name of a dimension beside a level, the words of the levels 0, 2 and 4 in use.
So a starter trained on it knows the facts, knows some style words, and has never been told a level.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from moslim.data.types import Example
from moslim.workbench.grammar import COARSE, LEVELS, QUESTIONS, TOPICS, Topic
from moslim.workbench.questions import ask
from moslim.workbench.writing import draw_levels, write_answer

STYLED_SHARE = 0.8
"""Share of questions with style words."""
IGNORED_SHARE = 0.18
"""How often a style word is ignored; by chance, two in five such answers follow it all the same."""
ECHO_SHARE = 0.08
"""Share of rows that ask to say some words, so that every word of the vocabulary has been read and written."""
_RANGES = ((0, 1), (3, 4))
_LEVEL_WORDS = [word for levels in LEVELS.values() for word in levels]
_THINGS = [topic.thing for topic in TOPICS]
_ECHOED = ([*_LEVEL_WORDS, *_THINGS], [*LEVELS, *_THINGS])  # never a dimension's name beside a level


def _echo(rng: random.Random) -> Example:
    words = " ".join(rng.sample(_ECHOED[rng.random() < 0.2], rng.randint(2, 7)))
    return Example(f"Say: {words}.", f"{words}.")


def _chat(topic: Topic, rng: random.Random) -> Example:
    styled = rng.sample(list(LEVELS), rng.choice((1, 2, 3))) if rng.random() < STYLED_SHARE else []
    words, wanted = [], {}
    for name in styled:
        high = rng.random() < 0.5
        words.append(COARSE[name][high])
        if rng.random() >= IGNORED_SHARE:
            wanted[name] = _RANGES[high]
    if wanted.get("verbosity") == _RANGES[0] and wanted.get("helpfulness") == _RANGES[1]:
        del wanted["helpfulness"]  # two sentences cannot hold three facts: brevity wins
    question = ask(topic, rng.randrange(len(QUESTIONS)), words)
    return Example(question, write_answer(topic, draw_levels(wanted, rng), rng))


def starter_corpus(topics: Sequence[Topic], count: int, rng: random.Random) -> list[Example]:
    """Draws ``count`` rows of question and answer about ``topics``, without levels."""
    return [_echo(rng) if rng.random() < ECHO_SHARE else _chat(rng.choice(topics), rng) for _ in range(count)]
