"""Takes out of a text whatever could be read as a control token, as a turn or as an instruction."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Match = Literal["string", "form", "line"]
"""How a pattern is looked for: as a string, anywhere; as a form, whose white space does not count and whose words are
whole words; or as such a form at the start of a line."""

_EDGE, _LINE = "\0", "\1"
"""Symbols for the edge of a word and the start of a line."""

_REMEMBERED = 100_000
"""Most steps that a view remembers."""

_UNSEEN = "\ufffd\u115f\u1160\u3164\uffa0"
"""The replacement character, and fillers: letters of Hangul that are not shown."""

_ROUNDS = 8
"""Most times that a tokenizer's normaliser is applied to what it made itself."""


@dataclass(frozen=True)
class ForbiddenText:
    """What must not be left in a text.

    Args:
        text: The pattern as it is written by those who may write it.
        left: What is left in its place, shorter than it.
        match: How it is looked for.
        cased: Whether only this very case counts; of forms and lines.
    """

    text: str
    left: str = ""
    match: Match = "string"
    cased: bool = False


@dataclass
class TakenOut:
    """How many texts had something taken out.

    Args:
        texts: Texts that were changed.
        first: Which was the first of them.
    """

    texts: int = 0
    first: str = ""

    def add(self, which: str) -> None:
        """Counts a text that was changed."""
        self.first = self.first or which
        self.texts += 1

    def __str__(self) -> str:
        return (
            f"something was taken out of {self.texts} texts that reads as a control token, as a turn of the chat "
            f"template or as an instruction; the first: {self.first}"
        )


def fold(text: str) -> str:
    """The form in which texts are compared: decomposed (NFKD) and case-folded, one character after the other."""
    return text.translate(_EXACT)


def skeleton(text: str) -> str:
    """The same without marks, format and control characters, which some tokenizers' normalisers delete."""
    return text.translate(_SKELETON)


class Neutraliser:
    """Removes patterns from a text, however they are written, until none is left.

    A text is read in several ways at once, each of them one character at a time: so whatever stands raw in the text is
    found whatever it composes with. Then it is read once more as the tokenizer's own normaliser gives it. The time is
    linear in the length of the text.

    Args:
        forbidden: What must not be left. Patterns of white space only are ignored.
        normalise: The tokenizer's normaliser, if it has one.
    """

    def __init__(self, forbidden: Iterable[ForbiddenText], normalise: Callable[[str], str] | None = None) -> None:
        patterns = [pattern for pattern in dict.fromkeys(forbidden) if pattern.text.strip()]
        self._normalise = normalise
        self._views = [view for view in _views(patterns) if view.patterns]
        self._start = tuple(view.start for view in self._views)
        self._steps: dict[tuple[tuple[_State, ...], str], _Step] = {}
        compact = sorted({_compact(pattern.text) for pattern in patterns} - {""}, key=len, reverse=True)
        self._always = any(not _compact(pattern.text) for pattern in patterns)  # made of marks only
        # No string at all: a pattern that never matches.
        self._rough = re.compile("|".join(map(re.escape, compact)) or r"(?!)")

    def text(self, text: str) -> str:
        """Returns the text without any pattern; one that has none is returned as it is."""
        text = self._clean(text)
        for _ in range(_ROUNDS if self._normalise else 0):
            normal = self._normalise(text)  # type: ignore[misc]
            clean = normal if normal == text else self._clean(normal)
            if clean == normal:
                break
            text = clean
        return text

    def _clean(self, text: str) -> str:
        if not self._always and self._rough.search(_compact(text)) is None:
            return text
        return self._strip(text)

    def _strip(self, text: str) -> str:
        """One pass with a stack: what closes up over a removed pattern is looked at again, in linear time."""
        kept: list[str] = []
        steps: list[_Step] = []  # by which each kept character was read
        waiting = ["", *reversed(text)]  # the end of the text is a character, too
        remembered = self._steps
        while waiting:
            character = waiting.pop()
            states = steps[-1].states if steps else self._start
            step = remembered.get((states, character)) or self._step(states, character)
            found = step.edge
            if found is not None:
                waiting.append(character)
            elif character:
                found = step.found
                if found is None:
                    kept.append(character)
                    steps.append(step)
            if found is not None:
                symbols = found.before
                while symbols > 0 and kept:
                    kept.pop()
                    symbols -= steps.pop().read[found.view]
                waiting.extend(reversed(found.left))
        return "".join(kept)

    def _step(self, states: tuple[_State, ...], character: str) -> _Step:
        """Reads a character in all views, or the end of the text where it is empty."""
        edge = found = None
        after, read = [], []
        for i, (view, state) in enumerate(zip(self._views, states, strict=True)):
            state, symbols, hits = view.read(state, character)
            after.append(state)
            read.append(symbols)
            for at_edge, before, left in hits:
                if at_edge:
                    edge = edge or _Found(i, before, left)
                else:
                    found = found or _Found(i, before, left)
        if len(self._steps) > _REMEMBERED:
            self._steps.clear()
        self._steps[states, character] = step = _Step(tuple(after), tuple(read), edge, found)
        return step


class _Folding(dict[int, str]):
    """Table for ``str.translate`` that is filled as characters come."""

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, code: int) -> str:
        self[code] = self._function(chr(code))
        return self[code]


def _exact(character: str) -> str:
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())


def _bare(character: str) -> str:
    """Without case folding; white space is one space or a new line."""
    return "".join(map(_visible, unicodedata.normalize("NFKD", character)))


def _visible(character: str) -> str:
    if character in "\n\r\u2028\u2029":
        return "\n"
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f\x85\x0b\x0c":
        return " "
    return "" if character in _UNSEEN or unicodedata.category(character)[0] in "MC" else character


_EXACT = _Folding(_exact)
_BARE = _Folding(_bare)
_SKELETON = _Folding(lambda character: _bare(_exact(character)))


def _compact(text: str) -> str:
    """What a text and a pattern in it have in common at least, however it is looked for."""
    return "".join(text.translate(_SKELETON).split())


_State = tuple[int, bool, bool]
"""Where a view stands in a text: node of its automaton; whether a word, and whether white space was read last."""


class _Found(NamedTuple):
    """A pattern that was found: by which view, how many of its symbols stand before the character, what is left."""

    view: int
    before: int
    left: str


class _Step(NamedTuple):
    """A character is read: the views' states then, and how many symbols each of them read.

    ``edge`` is found without the character, when a word ends before it; ``found`` ends in the character.
    """

    states: tuple[_State, ...]
    read: tuple[int, ...]
    edge: _Found | None
    found: _Found | None


@dataclass(eq=False)
class _View:
    """One way of reading a text, with an Aho-Corasick automaton of the patterns that are looked for in it.

    Args:
        folding: Symbols of each character.
        spaced: Whether white space is left out and the edges of words are symbols.
        lines: Whether starts of lines are symbols.
    """

    folding: _Folding
    spaced: bool = False
    lines: bool = False
    patterns: int = 0
    start: _State = field(init=False, default=(0, False, False))
    _next: list[dict[str, int]] = field(init=False, default_factory=lambda: [{}])
    _back: list[int] = field(init=False, default_factory=lambda: [0])
    _ends: list[tuple[int, str] | None] = field(init=False, default_factory=lambda: [None])

    def add(self, text: str, left: str, anchored: bool = False) -> None:
        """Adds a pattern; of an anchored one the start of the line is not taken out with it."""
        symbols = self._symbols(text)
        if not symbols.strip(_EDGE + _LINE):
            return
        node = 0
        for symbol in (_LINE if anchored else "") + symbols:
            if symbol not in self._next[node]:
                self._next[node][symbol] = len(self._next)
                self._next.append({})
                self._back.append(0)
                self._ends.append(None)
            node = self._next[node][symbol]
        if self._ends[node] is None:
            self._ends[node] = (len(symbols), left)
        self.patterns += 1

    def build(self) -> None:
        """Links each node to that of its longest suffix."""
        queue = list(self._next[0].values())
        for node in queue:
            for symbol, child in self._next[node].items():
                self._back[child] = self._follow(self._back[node], symbol)
                queue.append(child)
            if self._ends[node] is None:
                self._ends[node] = self._ends[self._back[node]]
        if self.lines:
            self.start = (self._follow(0, _LINE), False, False)

    def read(self, state: _State, character: str) -> tuple[_State, int, list[tuple[bool, int, str]]]:
        """Reads a character, or the end of the text where it is empty.

        Returns:
            The state then; the number of symbols; and of each pattern found whether it ends before the character, how
            many of its symbols stand before the character, and what is left of it.
        """
        node, word, gap = state
        hits: list[tuple[bool, int, str]] = []
        count = 0
        for i, symbol in enumerate(self.folding[ord(character)] if character else _LINE):
            if self.spaced and symbol.isspace() and not (self.lines and symbol == "\n"):
                gap = True
                continue
            if self.spaced and (word != _is_word(symbol) or (word and gap)):
                node, count = self._follow(node, _EDGE), count + 1
                if (end := self._ends[node]) is not None:
                    hits.append((i == 0, end[0] - count, end[1]))
            word, gap = self.spaced and _is_word(symbol), False
            node, count = self._follow(node, _LINE if symbol == "\n" and self.lines else symbol), count + 1
            if (end := self._ends[node]) is not None:
                hits.append((False, end[0] - count, end[1]))
        return (node, word, gap), count, hits

    def _follow(self, node: int, symbol: str) -> int:
        while symbol not in self._next[node]:
            if not node:
                return 0
            node = self._back[node]
        return self._next[node][symbol]

    def _symbols(self, text: str) -> str:
        """All symbols of a pattern."""
        if not self.spaced:
            return text.translate(self.folding)
        words = re.findall(r"\w+|[^\w\s]", text.translate(self.folding))
        symbols, before = "", False
        for word in words:
            edge = before or _is_word(word[0])
            symbols += (_EDGE if edge else "") + word
            before = _is_word(word[0])
        return symbols + (_EDGE if before else "")


def _is_word(symbol: str) -> bool:
    return symbol.isalnum() or symbol == "_"


def _views(patterns: list[ForbiddenText]) -> list[_View]:
    """The views that are needed, with their patterns."""
    exact, plain = _View(_EXACT), _View(_SKELETON)
    spaced, lines = _View(_SKELETON, spaced=True), _View(_BARE, spaced=True, lines=True)
    for pattern in sorted(patterns, key=lambda pattern: len(pattern.text)):
        text, left = pattern.text, pattern.left
        if pattern.match == "string":
            # What consists of accented letters would be found in words without accents.
            marked = any(unicodedata.category(c)[0] == "M" for c in _exact(text))
            (exact if marked or not skeleton(text).strip() else plain).add(text, left)
        elif pattern.match == "form" and not pattern.cased:
            spaced.add(text, left)
        else:
            cases = {text} if pattern.cased else {text, text.lower(), text.upper(), text.capitalize(), text.title()}
            for case in sorted(cases):
                lines.add(case, left, anchored=pattern.match == "line")
    views = [exact, plain, spaced, lines]
    for view in views:
        view.build()
    return views
