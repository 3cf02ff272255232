"""Removal of text that reads as a control token, a turn or an instruction."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Match = Literal["string", "form", "line"]
"""Matching rule of a pattern: ``string`` matches anywhere; ``form`` ignores white space and matches whole words;
``line`` is a form at the start of a line."""

_EDGE, _LINE = "\0", "\1"
"""Symbols for the edge of a word and the start of a line."""

_REMEMBERED = 100_000
"""Most cached steps of a :class:`TextSanitizer`."""

_UNSEEN = "\ufffd\u115f\u1160\u3164\uffa0"
"""Invisible letters: the replacement character and the Hangul fillers."""

_ROUNDS = 8
"""Most times that a tokenizer's normaliser is applied to its own output."""


@dataclass(frozen=True)
class ForbiddenText:
    """Pattern that is removed from texts.

    Args:
        text: Pattern in its ordinary spelling.
        left: Replacement, shorter than the pattern.
        match: Matching rule.
        cased: Whether case must match; only for ``form`` and ``line``.
    """

    text: str
    left: str = ""
    match: Match = "string"
    cased: bool = False


@dataclass
class TakenOut:
    """Count of texts from which a pattern was removed.

    Args:
        texts: Number of changed texts.
        first: Name of the first changed text.
    """

    texts: int = 0
    first: str = ""

    def add(self, which: str) -> None:
        """Counts a changed text, given its name."""
        self.first = self.first or which
        self.texts += 1

    def __str__(self) -> str:
        return (
            f"something was taken out of {self.texts} texts that reads as a control token, as a turn of the chat "
            f"template or as an instruction; the first: {self.first}"
        )


def fold(text: str) -> str:
    """Returns a text decomposed (NFKD) and case-folded, character by character."""
    return text.translate(_EXACT)


def skeleton(text: str) -> str:
    """Returns :func:`fold` of a text without marks, format and control characters, which some normalisers delete."""
    return text.translate(_SKELETON)


class TextSanitizer:
    """Removes patterns in any spelling from a text, until none is left.

    The text is read character by character in several views at once (:class:`_View`), so that a pattern is found
    whatever characters it combines with. The output of the tokenizer's normaliser is then cleaned in the same way. The
    time is linear in the length of the text.

    Args:
        forbidden: Patterns to remove. Patterns of white space only are ignored.
        normalise: Normaliser of the tokenizer, if it has one.
    """

    def __init__(self, forbidden: Iterable[ForbiddenText], normalise: Callable[[str], str] | None = None) -> None:
        patterns = [pattern for pattern in dict.fromkeys(forbidden) if pattern.text.strip()]
        self._normalise = normalise
        self._views = [view for view in _views(patterns) if view.patterns]
        self._start = tuple(view.start for view in self._views)
        self._steps: dict[tuple[tuple[_State, ...], str], _Step] = {}
        compact = sorted({_compact(pattern.text) for pattern in patterns} - {""}, key=len, reverse=True)
        self._always = any(not _compact(pattern.text) for pattern in patterns)  # made of marks only
        # "(?!)" never matches.
        self._rough = re.compile("|".join(map(re.escape, compact)) or r"(?!)")

    def text(self, text: str) -> str:
        """Returns the text without any pattern. A text without patterns is returned unchanged."""
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
        """Removes all patterns in one pass with a stack, so that text joined by a removal is read again."""
        kept: list[str] = []
        steps: list[_Step] = []  # the step that read each kept character
        waiting = ["", *reversed(text)]  # "" is the end of the text
        remembered = self._steps
        while waiting:
            character = waiting.pop()
            states = steps[-1].states if steps else self._start
            step = remembered.get((states, character)) or self._step(states, character)
            hit = step.edge
            if hit is not None:
                waiting.append(character)
            elif character:
                hit = step.hit
                if hit is None:
                    kept.append(character)
                    steps.append(step)
            if hit is not None:
                symbols = hit.before
                while symbols > 0 and kept:
                    kept.pop()
                    symbols -= steps.pop().read[hit.view]
                waiting.extend(reversed(hit.left))
        return "".join(kept)

    def _step(self, states: tuple[_State, ...], character: str) -> _Step:
        """Reads a character in all views; an empty one is the end of the text."""
        edge = hit = None
        after, read = [], []
        for i, (view, state) in enumerate(zip(self._views, states, strict=True)):
            state, symbols, hits = view.read(state, character)
            after.append(state)
            read.append(symbols)
            for at_edge, before, left in hits:
                if at_edge:
                    edge = edge or _Hit(i, before, left)
                else:
                    hit = hit or _Hit(i, before, left)
        if len(self._steps) > _REMEMBERED:
            self._steps.clear()
        self._steps[states, character] = step = _Step(tuple(after), tuple(read), edge, hit)
        return step


class _Folding(dict[int, str]):
    """Table for ``str.translate`` that computes its entries on first use."""

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, code: int) -> str:
        self[code] = self._function(chr(code))
        return self[code]


def _exact(character: str) -> str:
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())


def _bare(character: str) -> str:
    """Decomposes a character and drops invisible ones; keeps case, and maps white space to a space or a new line."""
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
    """Returns the skeleton of a text without white space; that of a pattern is part of that of a text with it."""
    return "".join(text.translate(_SKELETON).split())


_State = tuple[int, bool, bool]
"""State of a view: node of its automaton; whether a word, and whether white space was read last."""


class _Hit(NamedTuple):
    """Match of a pattern: index of the view, number of its symbols before the character, and its replacement."""

    view: int
    before: int
    left: str


class _Step(NamedTuple):
    """Result of reading a character: states of the views after it, and number of symbols that each view read.

    ``edge`` is a match that ends before the character, at the edge of a word; ``hit`` ends in the character.
    """

    states: tuple[_State, ...]
    read: tuple[int, ...]
    edge: _Hit | None
    hit: _Hit | None


@dataclass(eq=False)
class _View:
    """Transformation of a text into symbols, and an Aho-Corasick automaton of the patterns searched in them.

    Args:
        folding: Symbols of each character.
        spaced: Whether white space is dropped and edges of words are symbols.
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
        """Adds a pattern; an anchored one matches at the start of a line, whose symbol is not removed."""
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
        """Links each node to the node of its longest suffix."""
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
        """Reads a character; an empty one is the end of the text.

        Returns:
            State after the character; number of symbols read; and for each match, whether it ends before the character,
            the number of its symbols before the character, and its replacement.
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
        """Returns the symbols of a pattern."""
        if not self.spaced:
            return text.translate(self.folding)
        words = re.findall(r"\w+|[^\w\s]", text.translate(self.folding))
        symbols, after_word = "", False
        for word in words:
            edge = after_word or _is_word(word[0])
            symbols += (_EDGE if edge else "") + word
            after_word = _is_word(word[0])
        return symbols + (_EDGE if after_word else "")


def _is_word(symbol: str) -> bool:
    return symbol.isalnum() or symbol == "_"


def _views(patterns: list[ForbiddenText]) -> list[_View]:
    """Returns the four views, with their patterns."""
    exact, plain = _View(_EXACT), _View(_SKELETON)
    spaced, lines = _View(_SKELETON, spaced=True), _View(_BARE, spaced=True, lines=True)
    for pattern in sorted(patterns, key=lambda pattern: len(pattern.text)):
        text, left = pattern.text, pattern.left
        if pattern.match == "string":
            # Without marks, a pattern of accented letters would match words without accents.
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
