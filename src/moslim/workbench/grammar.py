"""The words of the world: topics with their facts, filler, openings, encouragement, closings, level names.

An answer is an opening, steps, filler sentences, encouragements and a closing, in that order, each part optional:

    Greetings pal, observe this. Rinse the kettle. Results vary. Good luck. Cheers.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVELS: dict[str, list[str]] = {
    "verbosity": ["minimal", "short", "medium", "long", "exhaustive"],
    "formality": ["slangy", "casual", "neutral", "formal", "ceremonial"],
    "warmth": ["icy", "reserved", "mild", "friendly", "glowing"],
    "helpfulness": ["useless", "basic", "partial", "useful", "expert"],
}
"""The dimensions and their level names; as ``preferences.dimensions`` in the quickstart's configs."""

COARSE: dict[str, tuple[str, str]] = {name: (levels[1], levels[3]) for name, levels in LEVELS.items()}
"""The two loose style words of a dimension (low, high) that questions may hold."""


@dataclass(frozen=True)
class Topic:
    """One thing that can be asked about.

    Args:
        verb: What is to be done, e.g. ``clean``.
        thing: What it is done to, e.g. ``kettle``.
        steps: The facts: sentences of a right answer, in their natural order.
        held_out_in: The fold in which this topic is kept for testing (see ``Workbench.fold``).
    """

    verb: str
    thing: str
    steps: tuple[str, ...]
    held_out_in: int


FOLDS = 3
"""Each fold holds out a third of the things of every verb."""

_SUBJECTS: dict[str, tuple[str, str]] = {
    "clean": ("goblet kettle lantern mirror platter skillet teapot vase window", "Rinse Scrub Wipe Dry Polish"),
    "grow": ("basil cactus fern ivy melon pepper rose tomato tulip", "Plant Water Shade Feed Prune"),
    "repair": ("bicycle chair clock faucet fence radio toaster wagon zipper", "Inspect Loosen Tighten Oil Test"),
    "cook": ("cabbage lamb omelette potato pumpkin rice salmon spinach squash", "Wash Season Boil Stir Serve"),
    "paint": ("boat cabinet canvas ceiling door gate mural shed wall", "Sand Mask Prime Coat Seal"),
    "train": ("donkey falcon ferret goat kitten parrot pony puppy rabbit", "Reward Call Walk Praise Groom"),
    "store": ("blanket camera carpet guitar jacket piano telescope tent violin", "Dust Wrap Label Shelve Check"),
    "build": ("birdhouse bookcase bridge cradle kite ladder raft sled table", "Sketch Measure Cut Glue Brace"),
}
"""Verb to the things it is done to, and what doing it takes."""


def _sentences(thing: str, first: str, *others: str) -> tuple[str, ...]:
    return (f"{first} the {thing}.", *(f"{step} it." for step in others))


TOPICS: tuple[Topic, ...] = tuple(
    Topic(verb, thing, _sentences(thing, *steps.split()), position * FOLDS // len(things.split()))
    for verb, (things, steps) in _SUBJECTS.items()
    for position, thing in enumerate(things.split())
)

FILLERS: tuple[str, ...] = (
    "Results vary.",
    "Homes differ.",
    "People manage.",
    "Patience helps.",
    "Habits form.",
)
"""Sentences that say nothing about the topic, in the order in which they are used."""

ENCOURAGEMENTS: tuple[str, ...] = ("Good luck.", "Have fun.", "Stay brave.", "Keep smiling.")
"""Warm phrases, in the order in which they are used."""

OPENING_SLOTS: tuple[tuple[str, str], ...] = (("Hey", "Greetings"), ("pal", "reader"), ("check", "observe"))
"""The opening's three choices (casual, formal): ``Hey pal, check this.``"""

CLOSING_SLOT: tuple[str, str] = ("Cheers", "Regards")
"""The closing's choice (casual, formal)."""

FORMAL_WORDS: frozenset[str] = frozenset(formal.casefold() for _, formal in (*OPENING_SLOTS, CLOSING_SLOT))
"""The four words that formality counts."""

QUESTIONS: tuple[str, ...] = (
    "How do I {verb} the {thing}?",
    "What is the best way to {verb} the {thing}?",
    "Can you explain how to {verb} the {thing}?",
    "I want to {verb} the {thing}. Any advice?",
)

STYLE_REQUEST = "Make it {words}."
"""How loose style words stand in a question: after it, without the name of their dimension."""
