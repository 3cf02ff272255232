"""Sources made of other sources (concatenation, comparisons from ratings), and questions that splits share."""

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
    """Returns a key that ignores case and white space; a chat of one turn has the key of its text."""
    messages = as_messages(question)
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return " ".join((messages[0]["content"] if len(messages) == 1 else text).casefold().split())


def without_shared(
    held_out: list[tuple[str, Record]], training: Mapping[str, Record], policy: SharedQuestions
) -> list[Record]:
    """Handles held-out rows whose question occurs in training, too.

    Args:
        held_out: Key and row of each held-out row.
        training: Training rows by key.
        policy: ``warn`` keeps the rows, ``drop`` removes them; both warn. ``error`` raises.

    Returns:
        The remaining held-out rows.

    Raises:
        UsageError: Questions are shared, and ``policy`` is ``error``.
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
    """Warns of held-out rows of one source whose question is among the training rows of another."""
    training_keys = {question_key(row.question) for row in training}
    shared = [key for key in (question_key(row.question) for row in held_out) if key in training_keys]
    if shared:
        warnings.warn(
            f"{len(shared)} of {len(held_out)} held-out rows ask {len(set(shared))} questions that another source "
            f"trains on, e.g. {shared[0][:80]!r}; they are kept",
            stacklevel=3,
        )


class ConcatSource(Source):
    """Concatenation of the rows of several sources, e.g. of tables that label different dimensions.

    Args:
        sources: The sources; in YAML also files that hold one each.
    """

    def __init__(self, sources: list[Source]) -> None:
        if not sources:
            raise UsageError("source.sources is empty: name at least one source")
        self.sources = sources

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. Warns of held-out questions that another source has in training."""
        parts = [source.rows(kind, split, preferences, seed) for source in self.sources]
        if kind is RowKind.LABELLED and split in (Split.VALIDATION, Split.TEST) and len(self.sources) > 1:
            training = [source.rows(kind, Split.TRAIN, preferences, seed) for source in self.sources]
            for i, part in enumerate(parts):
                warn_if_shared(part, [row for j, rows in enumerate(training) if j != i for row in rows])
        return [row for part in parts for row in part]

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """See the base class. Rows to be scored are streamed if the sources support it."""
        if kind is RowKind.LABELLED and split is Split.PREDICT:
            for source in self.sources:
                yield from source.stream(kind, split, preferences, seed)
        else:
            yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> list[Source]:
        """See the base class."""
        return self.sources

    def reachable(self, preference: Preference) -> bool:
        """Whether the preference is reachable in at least one source."""
        return any(source.reachable(preference) for source in self.sources)

    def held_out(self, preference: Preference) -> bool:
        """Whether at least one source holds the preference out."""
        return any(source.held_out(preference) for source in self.sources)


class ComparisonsFromRatings(Source):
    """Comparisons derived from ratings: adds to each row a rejected answer to the same question with a lower rating.

    The margin is the difference between the mean votes of the two answers, so that it is small where raters disagree
    ("Beyond the Binary", arXiv 2412.03822). Labels and votes are kept. A row without a lower-rated answer, or with a
    comparison of its own, is unchanged.

    Args:
        source: Source of the rated answers; in YAML also a file that holds one.
        dimension: Dimension of the ratings to compare.
    """

    def __init__(self, source: Source, dimension: str) -> None:
        self.source = source
        self.dimension = dimension

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. The rejected answer is drawn from the lower-rated ones."""
        preferences[self.dimension]  # raises if it is unknown
        rows = self.source.rows(kind, split, preferences, seed)
        if kind is not RowKind.LABELLED or split is Split.PREDICT:
            return rows
        rated_answers = defaultdict(list)
        for row in rows:
            if self.dimension in row.levels:
                rated_answers[question_key(row.question)].append((self._mean_vote(row), row.answer))
        rng = random.Random(derive_seed(seed, *b"rivals"))
        return [self._with_rejected(row, rated_answers[question_key(row.question)], rng) for row in rows]

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

    def _with_rejected(
        self, row: Example, rated_answers: list[tuple[float, str | None]], rng: random.Random
    ) -> Example:
        if row.rejected is not None or self.dimension not in row.levels:
            return row
        rating = self._mean_vote(row)
        lower = [(mean, answer) for mean, answer in rated_answers if mean < rating and answer != row.answer]
        if not lower:
            return row
        lower_rating, rejected = rng.choice(lower)
        return replace(row, rejected=rejected, comparison_dimensions=(self.dimension,), margin=rating - lower_rating)

    def _mean_vote(self, row: Example) -> float:
        votes = row.votes.get(self.dimension, (row.levels[self.dimension],))
        return sum(votes) / len(votes)
