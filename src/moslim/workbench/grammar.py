"""The words of the embedded world, its tokenizer, the writing of questions and answers, and their gold levels.

The words of the world: topics with their facts, filler, openings, encouragement, closings, level names.

An answer is an opening, steps, filler sentences, encouragements and a closing, in that order, each part optional:

    Greetings pal, observe this. Rinse the kettle. Results vary. Good luck. Cheers.

Asking about a topic, and finding the topic that was asked about.

Writing answers of given levels.

The judge that cannot be fooled: levels counted from the text, by rules that also hold for text nobody foresaw.

Each dimension has levels 0..4:

* verbosity: sentences other than the first use of an opening, encouragement or closing; 1 or fewer is level 0,
  5 or more is level 4. A sentence counts once for every 12 words begun, and a word once for every 16 letters begun,
  so that run-on text is not short.
* formality: how many of the four formal words occur.
* warmth: how many different encouragements occur, as whole sentences.
* helpfulness: how many different right steps for the question's topic occur, as whole sentences. ``it`` is the
  thing of this world that the answer named last, and the question's until it names one: steps that follow another
  thing's are not about ours.

A word-level tokenizer for the world's vocabulary, with a chat template.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moslim.data.types import Question
from moslim.utils.errors import UsageError

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


WORDS_PER_SENTENCE = 12
LETTERS_PER_WORD = 16
Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(re.findall(r"\w+", text.casefold()))


def sentences(text: str) -> list[Words]:
    """Splits at ``. ! ?``, their full-width forms and line ends into casefolded words; drops empty sentences."""
    return [words for part in re.split(r"[.!?\u3002\uff01\uff1f\n]", text) if (words := _words(part))]


_CHOICES = (False, True)
_FRAME = frozenset(_words(opening((a, b, c))) for a in _CHOICES for b in _CHOICES for c in _CHOICES) | frozenset(
    _words(word) for word in CLOSING_SLOT
)
_WARM = frozenset(map(_words, ENCOURAGEMENTS))
_OPENERS = frozenset(word.casefold() for word in OPENING_SLOTS[0])


@cache
def _right_steps(topic: Topic) -> frozenset[Words]:
    return frozenset(map(_words, topic.steps))


def _right_steps_in(found: list[Words], topic: Topic) -> set[Words]:
    right, spoken_of, done = _right_steps(topic), topic, set()
    for words in found:
        spoken_of = next(reversed(topics_in(" ".join(words))), spoken_of)
        if words in right and spoken_of is topic:
            done.add(words)
    return done


def _sentences_worth(words: Words) -> int:
    length = sum(-(-len(word) // LETTERS_PER_WORD) for word in words)
    return -(-length // WORDS_PER_SENTENCE)


def gold_levels(question: Question, answer: str) -> dict[str, int]:
    """Counts the level of every dimension.

    Args:
        question: The question, or the chat that ends with it. One that names no topic has no right steps.
        answer: Any text.

    Returns:
        Level by dimension name.
    """
    found = sentences(answer)
    distinct = set(found)
    topic = topic_of(question)
    framing: set[str | Words] = set()  # the opening, the closing and each encouragement are free once
    counted = 0
    for words in found:
        part = ("opening" if words[0] in _OPENERS else "closing") if words in _FRAME else words
        if (words in _FRAME or words in _WARM) and part not in framing:
            framing.add(part)
        else:
            counted += _sentences_worth(words)
    answer_words = {word for words in found for word in words}
    return {
        "verbosity": min(max(counted - 1, 0), MAX_LEVEL),
        "formality": len(answer_words & FORMAL_WORDS),
        "warmth": min(len(distinct & _WARM), MAX_LEVEL),
        "helpfulness": min(len(_right_steps_in(found, topic)), MAX_LEVEL) if topic else 0,
    }


PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_INSTRUCTION_WORDS = "[[ ]] : , Preferences"
"""Words that shipped instructions use; the starter has an embedding for them and has never seen them used."""


def vocabulary() -> list[str]:
    """All words, special tokens first, in a fixed order."""
    texts = [
        *QUESTIONS,
        STYLE_REQUEST.format(words="short and friendly"),
        "Say: short, friendly.",
        *FILLERS,
        *ENCOURAGEMENTS,
        *(opening((formal, formal, formal)) for formal in (False, True)),
        *CLOSING_SLOT,
        *(text for topic in TOPICS for text in (topic.verb, topic.thing, *topic.steps)),
        *(word for name, levels in LEVELS.items() for word in (name, *levels)),
    ]
    words = re.findall(r"\w+|[^\w\s{}]+", " ".join(texts).replace("{verb}", "").replace("{thing}", ""))
    words += _INSTRUCTION_WORDS.split()
    return [PAD, UNKNOWN, END, *ROLES, *sorted(set(words))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer. Text it produces has no space before ``. , ? !``."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words by spaces, none before "."
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
