"""Writing answers of given levels."""

from __future__ import annotations

import random
from collections.abc import Mapping

from moslim.errors import UsageError
from moslim.workbench.grammar import CLOSING_SLOT, ENCOURAGEMENTS, FILLERS, LEVELS, OPENING_SLOTS, Topic

MAX_LEVEL = 4


def reachable(levels: Mapping[str, int]) -> bool:
    """Whether one answer can have these levels: ``h`` right steps need ``h`` sentences, and verbosity counts them."""
    return levels.get("helpfulness", 0) <= levels.get("verbosity", MAX_LEVEL) + 1


def draw_levels(wanted: Mapping[str, tuple[int, ...]], rng: random.Random) -> dict[str, int]:
    """Draws levels uniformly from what one answer can have.

    Args:
        wanted: Levels to choose from, by dimension; a dimension that is absent takes any level.
        rng: Source of randomness.

    Raises:
        UsageError: No answer can have what is wanted.
    """
    every = tuple(range(MAX_LEVEL + 1))
    verbosity, helpfulness = wanted.get("verbosity", every), wanted.get("helpfulness", every)
    pairs = [(v, h) for v in verbosity for h in helpfulness if reachable({"verbosity": v, "helpfulness": h})]
    if not pairs:
        raise UsageError(f"no answer has verbosity in {verbosity} and helpfulness in {helpfulness}")
    levels = {name: rng.choice(wanted.get(name, every)) for name in LEVELS}
    levels["verbosity"], levels["helpfulness"] = rng.choice(pairs)
    return levels


def opening(formal: tuple[bool, bool, bool]) -> str:
    """The opening sentence with the given choices, e.g. ``Greetings pal, check this.``"""
    greeting, addressee, request = (slot[choice] for slot, choice in zip(OPENING_SLOTS, formal, strict=True))
    return f"{greeting} {addressee}, {request} this."


def write_answer(topic: Topic, levels: Mapping[str, int], rng: random.Random) -> str:
    """Writes an answer that has exactly these levels.

    Args:
        topic: What it is about.
        levels: A level for each of the four dimensions, reachable together.
        rng: Chooses which places are formal.

    Raises:
        UsageError: No answer has these levels.
    """
    if not reachable(levels):
        raise UsageError(f"no answer has levels {dict(levels)}: {levels['helpfulness']} facts need as many sentences")
    sentences = levels["verbosity"] + 1
    steps = levels["helpfulness"]
    if steps == MAX_LEVEL and sentences > MAX_LEVEL and rng.random() < 0.5:
        steps += 1  # level 4 is four facts or more
    formal = [place < levels["formality"] for place in range(4)]
    rng.shuffle(formal)
    parts = [opening((formal[0], formal[1], formal[2]))]
    parts += topic.steps[:steps]
    parts += FILLERS[: sentences - steps]
    parts += ENCOURAGEMENTS[: levels["warmth"]]
    parts.append(f"{CLOSING_SLOT[formal[3]]}.")
    return " ".join(parts)
