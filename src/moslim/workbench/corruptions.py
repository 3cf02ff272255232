"""Answers that went wrong, so that a classifier has seen what a policy will try."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from moslim.workbench.grammar import CLOSING_SLOT, ENCOURAGEMENTS, FILLERS, OPENING_SLOTS, Topic
from moslim.workbench.writing import draw_levels, write_answer

_FORMAL = [formal for _, formal in (*OPENING_SLOTS, CLOSING_SLOT)]


def _split(answer: str) -> list[str]:
    return [f"{part}." for part in answer.rstrip(".").split(". ")]


def foreign_facts(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Steps of which some or all are another topic's: its sentences, its thing in ours, or our thing in its sentences.

    Half are bare: with only the steps to look at, a classifier learns soonest what makes a step right.
    """
    kin = [other for other in others if other.verb == topic.verb and other is not topic]
    strangers = [other for other in others if other.verb != topic.verb]
    other = rng.choice(kin if kin and rng.random() < 0.6 else strangers)
    share = rng.choice((0.0, 1.0, 1.0, 0.5))
    ours = other.verb != topic.verb and rng.random() < 0.5
    steps = []
    for own, foreign in zip(topic.steps, other.steps, strict=True):
        wrong = foreign.replace(other.thing, topic.thing) if ours else foreign
        steps.append(wrong if rng.random() < share else own)
    steps = steps[: rng.choice((1, 1, 2, 3, 4, 5))]
    if rng.random() < 0.5:
        return " ".join(steps)
    first, *rest = _split(write_answer(topic, draw_levels({"helpfulness": (0,), "verbosity": (0, 1, 2)}, rng), rng))
    return " ".join([first, *steps, *rest])


def repeats(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """An answer in which some sentences stand two to four times."""
    answer = _split(write_answer(topic, draw_levels({"verbosity": (0, 1, 2, 3)}, rng), rng))
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(answer))
        answer[place:place] = [answer[place]] * rng.choice((1, 1, 2, 3))
    return " ".join(answer)


def shuffled(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """An answer whose sentences are out of order or from anywhere in the grammar."""
    pool = [*topic.steps, *FILLERS, *ENCOURAGEMENTS, *_split(write_answer(topic, draw_levels({}, rng), rng))]
    return " ".join(rng.choices(pool, k=rng.randint(1, 8)))


def cut_off(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """An answer that stops in the middle."""
    words = write_answer(topic, draw_levels({}, rng), rng).split()
    return " ".join(words[: rng.randrange(1, len(words))])


def word_salad(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """An answer with words swapped or drawn at random, or a row of formal words."""
    words = write_answer(topic, draw_levels({}, rng), rng).split()
    kind = rng.random()
    if kind < 0.4:
        rng.shuffle(words)
    elif kind < 0.8:
        foreign = " ".join(rng.choice(others).steps).split()
        words = [rng.choice(foreign) if rng.random() < 0.2 else word for word in words]
    else:
        formal = rng.choices(_FORMAL, k=rng.randint(1, 6))
        words = formal + words[rng.randrange(len(words)) :]
    return " ".join(words)


def empty(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Nothing."""
    return ""


KINDS: tuple[tuple[Callable[[Topic, Sequence[Topic], random.Random], str], int], ...] = (
    (foreign_facts, 40),
    (repeats, 5),
    (shuffled, 6),
    (cut_off, 4),
    (word_salad, 5),
    (empty, 1),
)
"""Ways to go wrong, with their weights."""


def corrupt(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws one corrupted answer about ``topic``; foreign material comes from ``others``."""
    kinds, weights = zip(*KINDS, strict=True)
    return rng.choices(kinds, weights)[0](topic, others, rng)
