"""Answers that went wrong, so that a classifier has seen what a policy will try."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from moslim.workbench.grammar import CLOSING_SLOT, ENCOURAGEMENTS, FILLERS, OPENING_SLOTS, Topic
from moslim.workbench.writing import draw_levels, write_answer

Corruption = Callable[[Topic, Sequence[Topic], random.Random], str]
"""From a topic, other topics and a source of randomness to an answer about the first that may have gone wrong."""

_FORMAL = [formal for _, formal in (*OPENING_SLOTS, CLOSING_SLOT)]


def _split(answer: str) -> list[str]:
    return [f"{part}." for part in answer.rstrip(".").split(". ")]


def lone_step(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """One step, right or wrong: with nothing else to look at, a classifier learns soonest what makes a step right."""
    return _some_steps(topic, others, rng, 1)


def bare_steps(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """One to four steps, right or wrong, and nothing else."""
    return _some_steps(topic, others, rng, rng.randint(1, 4))


def foreign_facts(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Steps of which some or all are another topic's, bare or within an answer."""
    steps = _some_steps(topic, others, rng, rng.choices((1, 2, 3, 4, 5), (7, 5, 3, 2, 3))[0])
    return steps if rng.random() < 0.35 else _within_answer(steps, topic, rng)


def _some_steps(topic: Topic, others: Sequence[Topic], rng: random.Random, count: int) -> str:
    """Neighbouring steps: ours, or another topic's sentences, its thing in ours, or our thing in its sentences."""
    kin = [other for other in others if other.verb == topic.verb and other is not topic]
    strangers = [other for other in others if other.verb != topic.verb]
    other = rng.choice(kin if kin and rng.random() < 0.5 else strangers)
    ours = other.verb != topic.verb and rng.random() < 0.5
    share = rng.choice((0.0, 0.5, 0.5, 1.0))
    start = rng.randint(0, len(topic.steps) - count) if rng.random() < 0.5 else 0
    steps = []
    for own, foreign in list(zip(topic.steps, other.steps, strict=True))[start : start + count]:
        wrong = foreign.replace(other.thing, topic.thing) if ours else foreign
        steps.append(wrong if rng.random() < share else own)
    return " ".join(steps)


def _within_answer(steps: str, topic: Topic, rng: random.Random) -> str:
    first, *rest = _split(write_answer(topic, draw_levels({"helpfulness": (0,), "verbosity": (0, 1, 2)}, rng), rng))
    return " ".join([first, steps, *rest])


def repeats(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """An answer in which sentences stand two to four times; or a step or two over and over, bare or in an answer."""
    if rng.random() < 0.5:
        chosen = sorted(rng.sample(range(len(topic.steps)), rng.choice((1, 2))))
        times = [rng.randint(2, 4) for _ in chosen]
        steps = " ".join(topic.steps[i] for i, count in zip(chosen, times, strict=True) for _ in range(count))
        return steps if rng.random() < 0.5 else _within_answer(steps, topic, rng)
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


WEIGHTS: tuple[tuple[Corruption, int], ...] = (
    (foreign_facts, 30),
    (repeats, 8),
    (shuffled, 4),
    (cut_off, 2),
    (word_salad, 6),
    (empty, 1),
)
"""Ways to go wrong, with their weights."""


def corrupt(topic: Topic, others: Sequence[Topic], rng: random.Random) -> str:
    """Draws one corrupted answer about ``topic``; foreign material comes from ``others``."""
    kinds, weights = zip(*WEIGHTS, strict=True)
    return rng.choices(kinds, weights)[0](topic, others, rng)
