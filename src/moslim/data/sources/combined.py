"""Sources made of other sources: concatenation, comparisons from ratings, and overlap between splits.

Questions that are asked in training and in a held-out part.

Several sources as one.

Comparisons made of ratings: of two answers to one question, the one that raters put higher was preferred.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from moslim.data.prompts import as_messages
from moslim.data.sources.records import Record
from moslim.data.types import Example, Question, RowKind, Source, Split
from moslim.ops.numerics import derive_seed
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError

SharedQuestions = Literal["warn", "drop", "error"]


def question_key(question: Question) -> str:
    """Returns what is equal for questions that differ in case or white space only; a chat of one turn is its text."""
    messages = as_messages(question)
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return " ".join((messages[0]["content"] if len(messages) == 1 else text).casefold().split())


def without_shared(
    held_out: list[tuple[str, Record]], training: Mapping[str, Record], policy: SharedQuestions
) -> list[Record]:
    """Looks for held-out rows whose question training has, too: what is measured on them is no surprise.

    Args:
        held_out: Key and row of each held-out row.
        training: A training row by key.
        policy: What is done about shared questions: the rows are kept, or dropped, with a warning, or are an error.

    Returns:
        The held-out rows that stay.

    Raises:
        UsageError: There are shared questions, and ``policy`` is ``error``.
    """
    shared = [(key, row) for key, row in held_out if key in training]
    if not shared:
        return [row for _, row in held_out]
    key, row = shared[0]
    message = (
        f"{len(shared)} of {len(held_out)} held-out rows ask {len({key for key, _ in shared})} questions that training "
        f"has, too, e.g. {key[:80]!r} ({row.place}; {training[key].place})"
    )
    if policy == "error":
        raise UsageError(f"{message}; `shared_questions: drop` leaves these held-out rows out")
    warnings.warn(f"{message}; they are {'left out' if policy == 'drop' else 'kept'}", stacklevel=4)
    return [row for key, row in held_out if policy == "warn" or key not in training]


def warn_if_shared(held_out: Sequence[Example], training: Sequence[Example]) -> None:
    """Warns of held-out rows of one source whose question another source has in training."""
    known = {question_key(row.question) for row in training}
    shared = [key for key in (question_key(row.question) for row in held_out) if key in known]
    if shared:
        warnings.warn(
            f"{len(shared)} of {len(held_out)} held-out rows ask {len(set(shared))} questions that another source "
            f"trains on, e.g. {shared[0][:80]!r}; they are kept",
            stacklevel=3,
        )


class ConcatSource(Source):
    """The rows of several sources, one after the other, e.g. tables that label different dimensions.

    Args:
        sources: The sources; in YAML also files that hold one each.
    """

    def __init__(self, sources: list[Source]) -> None:
        if not sources:
            raise UsageError("source.sources is empty: name at least one source")
        self.sources = sources

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. Questions of held-out rows that another source trains on are said in a warning."""
        parts = [source.rows(kind, split, preferences, seed) for source in self.sources]
        if kind is RowKind.LABELLED and split in (Split.VALIDATION, Split.TEST) and len(self.sources) > 1:
            training = [source.rows(kind, Split.TRAIN, preferences, seed) for source in self.sources]
            for i, part in enumerate(parts):
                warn_if_shared(part, [row for j, rows in enumerate(training) if j != i for row in rows])
        return [row for part in parts for row in part]

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """See the base class. Rows to be scored are read one at a time where the sources can."""
        if kind is RowKind.LABELLED and split is Split.PREDICT:
            for source in self.sources:
                yield from source.stream(kind, split, preferences, seed)
        else:
            yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> list[Source]:
        """See the base class."""
        return self.sources

    def reachable(self, preference: Preference) -> bool:
        """Whether one of the sources calls it reachable."""
        return any(source.reachable(preference) for source in self.sources)

    def held_out(self, preference: Preference) -> bool:
        """Whether one of the sources holds it out."""
        return any(source.held_out(preference) for source in self.sources)


class ComparisonsFromRatings(Source):
    """The rows of another source, each beside an answer to the same question that raters put lower on a dimension.

    The margin is the difference between the means of their votes, so that it is small where raters disagree (the idea
    of "Beyond the Binary", arXiv 2412.03822). Labels and votes stay, and teach the classifier besides. A row without a
    lower rival, or that compares something already, is left as it is.

    Args:
        source: The source of the rated answers; in YAML also a file that holds one.
        dimension: What is compared.
    """

    def __init__(self, source: Source, dimension: str) -> None:
        self.source = source
        self.dimension = dimension

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class; which of the lower answers is the rival is drawn."""
        preferences[self.dimension]
        rows = self.source.rows(kind, split, preferences, seed)
        if kind is not RowKind.LABELLED or split is Split.PREDICT:
            return rows
        answers = defaultdict(list)
        for row in rows:
            if self.dimension in row.levels:
                answers[question_key(row.question)].append((self._mean(row), row.answer))
        rng = random.Random(derive_seed(seed, *b"rivals"))
        return [self._compared(row, answers[question_key(row.question)], rng) for row in rows]

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """See the base class."""
        if kind is RowKind.LABELLED and split is Split.PREDICT:
            yield from self.source.stream(kind, split, preferences, seed)
        else:
            yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> list[Source]:
        """See the base class."""
        return [self.source]

    def reachable(self, preference: Preference) -> bool:
        """See the base class."""
        return self.source.reachable(preference)

    def held_out(self, preference: Preference) -> bool:
        """See the base class."""
        return self.source.held_out(preference)

    def _compared(self, row: Example, answers: list[tuple[float, str | None]], rng: random.Random) -> Example:
        if row.rejected is not None or self.dimension not in row.levels:
            return row
        own = self._mean(row)
        lower = [(mean, answer) for mean, answer in answers if mean < own and answer != row.answer]
        if not lower:
            return row
        mean, rejected = rng.choice(lower)
        return replace(row, rejected=rejected, comparison_dimensions=(self.dimension,), margin=own - mean)

    def _mean(self, row: Example) -> float:
        votes = row.votes.get(self.dimension, (row.levels[self.dimension],))
        return sum(votes) / len(votes)
