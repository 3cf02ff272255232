"""Generated data of the embedded world.

- Corpus of the starter (the base language model): unlabelled chats in which loose style words are mostly followed. It
  has no instructions, no dimension name beside a level, and no use of the words of levels 0, 2 and 4. So the starter
  knows the facts and some style words, but no levels.
- Corrupted answers, which prepare a classifier for the failures of a policy.
- Raters: several noisy votes in place of the exact level.
- Best-of-n prompts, for which exactly one of several answers fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moslim.data.types import Example, agreed_level
from moslim.workbench.grammar import (
    CLOSING_SLOT,
    COARSE,
    ENCOURAGEMENTS,
    FILLERS,
    LEVELS,
    MAX_LEVEL,
    OPENING_SLOTS,
    QUESTIONS,
    TOPICS,
    Topic,
    ask,
    draw_levels,
    reachable,
    write_answer,
)

STYLED_SHARE = 0.8
"""Share of questions with style words."""
IGNORED_SHARE = 0.18
"""Probability that a style word is ignored; two in five of these answers follow it by chance."""
ECHO_SHARE = 0.08
"""Default share of rows that ask to repeat some words, so that every word of the vocabulary is read and written."""
_RANGES = ((0, 1), (3, 4))
_LEVEL_WORDS = [word for levels in LEVELS.values() for word in levels]
_THINGS = [topic.thing for topic in TOPICS]
_ECHOED = ([*_LEVEL_WORDS, *_THINGS], [*LEVELS, *_THINGS])  # no dimension name beside a level


def _echo(rng: random.Random) -> Example:
    words = " ".join(rng.sample(_ECHOED[rng.random() < 0.2], rng.randint(2, 7)))
    return Example(f"Say: {words}.", f"{words}.")


def _chat(topic: Topic, rng: random.Random) -> Example:
    styled = rng.sample(list(LEVELS), rng.choice((1, 2, 3))) if rng.random() < STYLED_SHARE else []
    words, level_choices = [], {}
    for name in styled:
        high = rng.random() < 0.5
        words.append(COARSE[name][high])
        if rng.random() >= IGNORED_SHARE:
            level_choices[name] = _RANGES[high]
    if level_choices.get("verbosity") == _RANGES[0] and level_choices.get("helpfulness") == _RANGES[1]:
        del level_choices["helpfulness"]  # two sentences cannot hold three facts: verbosity has priority
    question = ask(topic, rng.randrange(len(QUESTIONS)), words)
    return Example(question, write_answer(topic, draw_levels(level_choices, rng), rng))


def starter_corpus(
    topics: Sequence[Topic], count: int, rng: random.Random, echo_share: float = ECHO_SHARE
) -> list[Example]:
    """Draws ``count`` pairs of question and answer about ``topics``, without levels.

    Args:
        topics: Topics of the questions.
        count: Number of pairs.
        rng: Random generator.
        echo_share: Share of pairs that ask to repeat some words instead.
    """
    return [_echo(rng) if rng.random() < echo_share else _chat(rng.choice(topics), rng) for _ in range(count)]


Corruption = Callable[[Topic, Sequence[Topic], random.Random], str]
"""Function of a topic, other topics and a random generator that returns a possibly wrong answer about the topic."""

_FORMAL = [formal for _, formal in (*OPENING_SLOTS, CLOSING_SLOT)]


def _split(answer: str) -> list[str]:
    return [f"{part}." for part in answer.rstrip(".").split(". ")]


def lone_step(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws a single step, right or wrong, from which a classifier learns fastest which steps are right."""
    return _some_steps(topic, others, rng, 1)


def bare_steps(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws one to four steps, right or wrong, without other sentences."""
    return _some_steps(topic, others, rng, rng.randint(1, 4))


def foreign_facts(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws steps of which some or all belong to another topic, bare or within an answer."""
    steps = _some_steps(topic, others, rng, rng.choices((1, 2, 3, 4, 5), (7, 5, 3, 2, 3))[0])
    return steps if rng.random() < 0.35 else _within_answer(steps, topic, rng)


def _some_steps(topic: Topic, others: Sequence[Topic], rng: random.Random, count: int) -> str:
    """Draws consecutive steps, each right, or that of another topic, possibly with this topic's thing inserted."""
    same_verb = [other for other in others if other.verb == topic.verb and other is not topic]
    other_verb = [other for other in others if other.verb != topic.verb]
    other = rng.choice(same_verb if same_verb and rng.random() < 0.5 else other_verb)
    insert_thing = other.verb != topic.verb and rng.random() < 0.5
    wrong_share = rng.choice((0.0, 0.5, 0.5, 1.0))
    start = rng.randint(0, len(topic.steps) - count) if rng.random() < 0.5 else 0
    steps = []
    for right, foreign in list(zip(topic.steps, other.steps, strict=True))[start : start + count]:
        wrong = foreign.replace(other.thing, topic.thing) if insert_thing else foreign
        steps.append(wrong if rng.random() < wrong_share else right)
    return " ".join(steps)


def repeated_steps(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws right steps of which one or two repeat an earlier one, bare or within an answer."""
    steps = list(topic.steps[: rng.randint(2, 5)])
    for _ in range(rng.choice((1, 1, 2))):
        repeated, replaced = sorted(rng.sample(range(len(steps)), 2))
        steps[replaced] = steps[repeated]
    text = " ".join(steps)
    return text if rng.random() < 0.3 else _within_answer(text, topic, rng)


def dropped_words(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws an answer without one or two of its words."""
    answer = _split(write_answer(topic, draw_levels({}, rng), rng))
    for _ in range(rng.choice((1, 2))):
        place = rng.randrange(len(answer))
        words = answer[place].rstrip(".").split()
        del words[rng.randrange(len(words))]
        answer[place : place + 1] = [f"{' '.join(words).rstrip(',')}."] if words else []
    return " ".join(answer)


def _within_answer(steps: str, topic: Topic, rng: random.Random) -> str:
    first, *rest = _split(write_answer(topic, draw_levels({"helpfulness": (0,), "verbosity": (0, 1, 2)}, rng), rng))
    return " ".join([first, steps, *rest])


def repeats(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws an answer with sentences repeated, or one or two repeated steps, bare or within an answer."""
    if rng.random() < 0.5:
        step_indices = sorted(rng.sample(range(len(topic.steps)), rng.choice((1, 2))))
        counts = [rng.randint(2, 4) for _ in step_indices]
        steps = " ".join(topic.steps[i] for i, count in zip(step_indices, counts, strict=True) for _ in range(count))
        return steps if rng.random() < 0.5 else _within_answer(steps, topic, rng)
    answer = _split(write_answer(topic, draw_levels({"verbosity": (0, 1, 2, 3)}, rng), rng))
    for _ in range(rng.choice((1, 1, 2))):
        position = rng.randrange(len(answer))
        place = position if rng.random() < 0.5 else rng.randrange(1, len(answer))
        answer[place:place] = [answer[position]] * rng.choice((1, 1, 2, 3))
    return " ".join(answer)


def shuffled(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws sentences at random from an answer, its topic, the fillers and the encouragements."""
    pool = [*topic.steps, *FILLERS, *ENCOURAGEMENTS, *_split(write_answer(topic, draw_levels({}, rng), rng))]
    return " ".join(rng.choices(pool, k=rng.randint(1, 8)))


def cut_off(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws an answer that is cut off after a random word."""
    words = write_answer(topic, draw_levels({}, rng), rng).split()
    return " ".join(words[: rng.randrange(1, len(words))])


def word_salad(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws an answer with shuffled words, with words of another topic, or with formal words in place of its start."""
    words = write_answer(topic, draw_levels({}, rng), rng).split()
    draw = rng.random()
    if draw < 0.4:
        rng.shuffle(words)
    elif draw < 0.8:
        foreign = " ".join(rng.choice(others).steps).split()
        words = [rng.choice(foreign) if rng.random() < 0.2 else word for word in words]
    else:
        formal = rng.choices(_FORMAL, k=rng.randint(1, 6))
        words = formal + words[rng.randrange(len(words)) :]
    return " ".join(words)


def empty(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Returns an empty answer."""
    return ""


WEIGHTS: tuple[tuple[Corruption, int], ...] = (
    (foreign_facts, 30),
    (repeats, 8),
    (repeated_steps, 12),
    (dropped_words, 6),
    (shuffled, 4),
    (cut_off, 2),
    (word_salad, 6),
    (empty, 1),
)
"""Corruptions and their relative frequencies."""


def corrupt(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws a corrupted answer about ``topic``, with foreign material from ``others``."""
    corruptions, weights = zip(*WEIGHTS, strict=True)
    return rng.choices(corruptions, weights)[0](topic, others, rng)


def rate(row: Example, raters: int, noise: float, rng: random.Random) -> Example:
    """Replaces the exact levels of a row by votes of raters and their agreed levels.

    Args:
        row: Row with exact levels.
        raters: Number of raters per dimension; a single rater gives a level but no votes.
        noise: Standard deviation of a rater's normal error in levels; votes are rounded and clipped to the levels.
        rng: Random generator of the errors.
    """
    votes = {
        name: tuple(_clipped(level + round(rng.gauss(0.0, noise)), len(LEVELS[name])) for _ in range(raters))
        for name, level in row.levels.items()
    }
    levels = {name: agreed_level(levels) for name, levels in votes.items()}
    return replace(row, levels=levels, votes=votes if raters > 1 else {})


def _clipped(level: int, level_count: int) -> int:
    return max(0, min(level, level_count - 1))


ANSWERS = 4
"""Number of answers per best-of-n prompt."""


def best_of_records(
    topics: Sequence[Topic], count: int, rng: random.Random, paraphrases: int = 2
) -> list[dict[str, Any]]:
    """Draws best-of-n prompts in the format of :func:`moslim.evaluation.best_of.read_choices`.

    Each preference names one or two dimensions. The four answers differ in their levels on these, so that exactly one
    fits; their other levels are random. A paraphrase is another form of the question.

    Args:
        topics: Topics of the questions.
        count: Number of prompts.
        rng: Random generator.
        paraphrases: Paraphrases per question, at most three.
    """
    records = []
    for _ in range(count):
        topic = rng.choice(topics)
        form, *paraphrase_forms = rng.sample(range(len(QUESTIONS)), 1 + paraphrases)
        options = _distinct_levels(rng.sample(list(LEVELS), rng.choice((1, 2))), rng)
        right = rng.randrange(ANSWERS)
        records.append(
            {
                "question": ask(topic, form),
                "paraphrases": [ask(topic, other) for other in paraphrase_forms],
                "answers": [_answer(topic, levels, rng) for levels in options],
                "preference": options[right],
                "right": right,
            }
        )
    return records


def _distinct_levels(names: Sequence[str], rng: random.Random) -> list[dict[str, int]]:
    """Draws distinct reachable levels of the named dimensions, one for each answer."""
    options: list[dict[str, int]] = []
    while len(options) < ANSWERS:
        levels = {name: rng.randint(0, MAX_LEVEL) for name in names}
        if reachable(levels) and levels not in options:
            options.append(levels)
    return options


def _answer(topic: Topic, levels: dict[str, int], rng: random.Random) -> str:
    return write_answer(topic, draw_levels({name: (level,) for name, level in levels.items()}, rng), rng)
