"""Texts of the embedded world: the starter's corpus, corrupted answers, raters and best-of-n prompts.

The unlabelled text that the starter learns: chats in which loose style words are followed, most of the time.

What is not in it: an instruction, the name of a dimension beside a level, the words of the levels 0, 2 and 4 in use.
So a starter trained on it knows the facts, knows some style words, and has never been told a level.

Answers that went wrong, so that a classifier has seen what a policy will try.

Raters who err: several noisy votes in place of a level that is known exactly.

Prompts of which exactly one of several answers fits: the embedded world's best-of-n evaluation.
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


def rate(row: Example, raters: int, noise: float, rng: random.Random) -> Example:
    """Returns a row with the votes of raters, and with what they come to as its levels.

    Args:
        row: A row with exact levels.
        raters: How many raters vote on each dimension; one alone leaves no votes, only a level.
        noise: Standard deviation, in levels, of a rater's error, which is normal, rounded and clipped to the levels.
        rng: What makes the errors.
    """
    votes = {
        name: tuple(_clipped(level + round(rng.gauss(0.0, noise)), len(LEVELS[name])) for _ in range(raters))
        for name, level in row.levels.items()
    }
    levels = {name: agreed_level(given) for name, given in votes.items()}
    return replace(row, levels=levels, votes=votes if raters > 1 else {})


def _clipped(level: int, levels: int) -> int:
    return max(0, min(level, levels - 1))


ANSWERS = 4


def best_of_records(
    topics: Sequence[Topic], count: int, rng: random.Random, paraphrases: int = 2
) -> list[dict[str, Any]]:
    """Draws prompts in the format of :func:`moslim.evaluation.best_of.read_choices`.

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
