"""Comparisons made of ratings: of two answers to one question, the one that raters put higher was preferred."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from moslim.data.sources.base import Source
from moslim.data.sources.overlap import question_key
from moslim.data.types import Example, RowKind, Split
from moslim.noise import derive_seed
from moslim.preferences import Preference, PreferenceSet


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
