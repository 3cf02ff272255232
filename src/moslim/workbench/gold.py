"""The judge that cannot be fooled: levels counted from the text, by rules that also hold for text nobody foresaw.

Each dimension has levels 0..4:

* verbosity: sentences other than the first use of an opening, encouragement or closing; 1 or fewer is level 0,
  5 or more is level 4. A sentence counts once for every 12 words begun, and a word once for every 16 letters begun,
  so that run-on text is not short.
* formality: how many of the four formal words occur.
* warmth: how many different encouragements occur, as whole sentences.
* helpfulness: how many different right steps for the question's topic occur, as whole sentences. ``it`` is the
  thing of this world that the answer named last, and the question's until it names one: steps that follow another
  thing's are not about ours.
"""

from __future__ import annotations

import re
from functools import cache

from moslim.data.types import Question
from moslim.workbench.grammar import CLOSING_SLOT, ENCOURAGEMENTS, FORMAL_WORDS, OPENING_SLOTS, Topic
from moslim.workbench.questions import topic_of, topics_in
from moslim.workbench.writing import MAX_LEVEL, opening

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
    spoken = {word for words in found for word in words}
    return {
        "verbosity": min(max(counted - 1, 0), MAX_LEVEL),
        "formality": len(spoken & FORMAL_WORDS),
        "warmth": min(len(distinct & _WARM), MAX_LEVEL),
        "helpfulness": min(len(_right_steps_in(found, topic)), MAX_LEVEL) if topic else 0,
    }
