"""Grammar of the embedded world: words, questions, answers of given levels, their gold levels, and the tokenizer.

An answer is an opening, steps, filler sentences, encouragements and a closing, in that order, each part optional::

    Greetings pal, observe this. Rinse the kettle. Results vary. Good luck. Cheers.

The gold scorer (:func:`gold_levels`) counts the level 0..4 of each dimension in any text:

* verbosity: number of sentences, without the first opening, the first closing and the first use of each
  encouragement; up to 1 is level 0, 5 or more is level 4. A sentence counts once per 12 words begun, and a word once
  per 16 letters begun, so that run-on text is not short.
* formality: number of the four formal words that occur.
* warmth: number of different encouragements, as whole sentences.
* helpfulness: number of different right steps for the topic of the question, as whole sentences. ``it`` refers to the
  thing that the answer names last, or to that of the question before the answer names one. So steps that follow the
  thing of another topic do not count.
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
"""Level names by dimension, as ``preferences.dimensions`` in the quickstart's configs."""

COARSE: dict[str, tuple[str, str]] = {name: (levels[1], levels[3]) for name, levels in LEVELS.items()}
"""Two loose style words (low, high) by dimension, which questions may contain."""


@dataclass(frozen=True)
class Topic:
    """Topic of questions: an action on a thing.

    Args:
        verb: Action, e.g. ``clean``.
        thing: Object of the action, e.g. ``kettle``.
        steps: Sentences of a right answer, in order.
        held_out_in: Fold in which the topic is held out for testing (see ``Workbench.fold``).
    """

    verb: str
    thing: str
    steps: tuple[str, ...]
    held_out_in: int


FOLDS = 3
"""Number of folds; each holds out a third of the things of every verb."""

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
"""Things and steps by verb."""


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
"""Sentences without information about the topic, in order of use."""

ENCOURAGEMENTS: tuple[str, ...] = ("Good luck.", "Have fun.", "Stay brave.", "Keep smiling.")
"""Warm phrases, in order of use."""

OPENING_SLOTS: tuple[tuple[str, str], ...] = (("Hey", "Greetings"), ("pal", "reader"), ("check", "observe"))
"""Choices (casual, formal) for the three words of the opening ``Hey pal, check this.``"""

CLOSING_SLOT: tuple[str, str] = ("Cheers", "Regards")
"""Choices (casual, formal) for the closing."""

FORMAL_WORDS: frozenset[str] = frozenset(formal.casefold() for _, formal in (*OPENING_SLOTS, CLOSING_SLOT))
"""Words that formality counts."""

QUESTIONS: tuple[str, ...] = (
    "How do I {verb} the {thing}?",
    "What is the best way to {verb} the {thing}?",
    "Can you explain how to {verb} the {thing}?",
    "I want to {verb} the {thing}. Any advice?",
)

STYLE_REQUEST = "Make it {words}."
"""Request for style words, appended to a question without the names of the dimensions."""


_BY_THING = {topic.thing: topic for topic in TOPICS}


def ask(topic: Topic, form: int, style_words: Sequence[str] = ()) -> str:
    """Writes a question.

    Args:
        topic: Topic of the question.
        form: Index into ``QUESTIONS``.
        style_words: Loose style words to add, e.g. ``["short", "friendly"]``.
    """
    question = QUESTIONS[form].format(verb=topic.verb, thing=topic.thing)
    if style_words:
        question += " " + STYLE_REQUEST.format(words=" and ".join(style_words))
    return question


def topics_in(text: str) -> list[Topic]:
    """Returns the topics named in a text, in order and with repetitions."""
    return [_BY_THING[word] for word in re.findall(r"[a-z]+", text.casefold()) if word in _BY_THING]


def topic_of(question: Question) -> Topic | None:
    """Returns the first topic named in a question, or in the last user turn of a chat; None if there is none."""
    if not isinstance(question, str):
        question = next((m["content"] for m in reversed(question) if m["role"] == "user"), "")
    return next(iter(topics_in(question)), None)


MAX_LEVEL = 4


def reachable(levels: Mapping[str, int]) -> bool:
    """Whether an answer can have these levels: right steps are sentences, which verbosity counts."""
    return levels.get("helpfulness", 0) <= levels.get("verbosity", MAX_LEVEL) + 1


def draw_levels(wanted: Mapping[str, tuple[int, ...]], rng: random.Random) -> dict[str, int]:
    """Draws reachable levels uniformly.

    Args:
        wanted: Allowed levels by dimension; all levels for dimensions that are not named.
        rng: Random generator.

    Raises:
        UsageError: No reachable levels are allowed.
    """
    all_levels = tuple(range(MAX_LEVEL + 1))
    verbosity, helpfulness = wanted.get("verbosity", all_levels), wanted.get("helpfulness", all_levels)
    combinations = [(v, h) for v in verbosity for h in helpfulness if reachable({"verbosity": v, "helpfulness": h})]
    if not combinations:
        raise UsageError(f"no answer has verbosity in {verbosity} and helpfulness in {helpfulness}")
    levels = {name: rng.choice(wanted.get(name, all_levels)) for name in LEVELS}
    levels["verbosity"], levels["helpfulness"] = rng.choice(combinations)
    return levels


def opening(formal: tuple[bool, bool, bool]) -> str:
    """Returns the opening sentence with the given choices, e.g. ``Greetings pal, check this.``"""
    greeting, addressee, request = (slot[choice] for slot, choice in zip(OPENING_SLOTS, formal, strict=True))
    return f"{greeting} {addressee}, {request} this."


def write_answer(topic: Topic, levels: Mapping[str, int], rng: random.Random) -> str:
    """Writes an answer that has exactly these levels.

    Args:
        topic: Topic of the answer.
        levels: Level of each of the four dimensions.
        rng: Random generator that chooses the formal words.

    Raises:
        UsageError: The levels are not reachable.
    """
    if not reachable(levels):
        raise UsageError(f"no answer has levels {dict(levels)}: {levels['helpfulness']} facts need as many sentences")
    sentences = levels["verbosity"] + 1
    steps = levels["helpfulness"]
    if steps == MAX_LEVEL and sentences > MAX_LEVEL and rng.random() < 0.5:
        steps += 1  # level 4 is four facts or more
    formal = [slot < levels["formality"] for slot in range(4)]
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
    """Splits a text at ``. ! ?``, their full-width forms and line ends into sentences of casefolded words.

    Empty sentences are dropped.
    """
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


def _right_steps_in(answer_sentences: list[Words], topic: Topic) -> set[Words]:
    """Distinct right steps in an answer, of the sentences in which ``it`` refers to the topic."""
    right, current_topic, steps = _right_steps(topic), topic, set()
    for words in answer_sentences:
        current_topic = next(reversed(topics_in(" ".join(words))), current_topic)
        if words in right and current_topic is topic:
            steps.add(words)
    return steps


def _sentence_count(words: Words) -> int:
    """Number of sentences that a sentence counts for, by its length."""
    length = sum(-(-len(word) // LETTERS_PER_WORD) for word in words)
    return -(-length // WORDS_PER_SENTENCE)


def gold_levels(question: Question, answer: str) -> dict[str, int]:
    """Counts the level of every dimension; see the module docstring for the rules.

    Args:
        question: The question, or a chat that ends with it; without a topic in it, no step is right.
        answer: Any text.

    Returns:
        Level by dimension name.
    """
    answer_sentences = sentences(answer)
    distinct = set(answer_sentences)
    topic = topic_of(question)
    framing: set[str | Words] = set()  # parts whose first use does not count
    sentence_count = 0
    for words in answer_sentences:
        part = ("opening" if words[0] in _OPENERS else "closing") if words in _FRAME else words
        if (words in _FRAME or words in _WARM) and part not in framing:
            framing.add(part)
        else:
            sentence_count += _sentence_count(words)
    answer_words = {word for words in answer_sentences for word in words}
    return {
        "verbosity": min(max(sentence_count - 1, 0), MAX_LEVEL),
        "formality": len(answer_words & FORMAL_WORDS),
        "warmth": min(len(distinct & _WARM), MAX_LEVEL),
        "helpfulness": min(len(_right_steps_in(answer_sentences, topic)), MAX_LEVEL) if topic else 0,
    }


PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_INSTRUCTION_WORDS = "[[ ]] : , Preferences"
"""Words of the shipped instructions: in the vocabulary, but not in the starter's corpus."""


def vocabulary() -> list[str]:
    """Returns all words in a fixed order, special tokens first."""
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
    """Returns a word-level tokenizer with a chat template; decoded text has no space before ``. , ? !``."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words by spaces, but not before "."
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
