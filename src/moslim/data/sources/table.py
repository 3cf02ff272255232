"""Question-answer tables: CSV, JSON Lines, parquet, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from moslim.data.prompts import as_messages
from moslim.data.sources.base import Source
from moslim.data.sources.records import Record, is_file_name, read_file, read_hub
from moslim.data.sources.scale import Scale, is_missing
from moslim.data.types import Example, Question, Split, View
from moslim.preferences import Preference, PreferenceSet


class Table(Source):
    """Rows of a table, one question-answer pair each.

    Schema: a column with the question; a column with the answer (not needed in the policy view); one column per
    dimension with its label. A question is a text, or, in JSON Lines, parquet and on the Hub, the chat so far:
    ``[{"role": "user", "content": "..."}, ...]``, ending with a user turn. A label is a level 0..K-1, or whatever
    ``scales`` turns into one. A blank, null or NaN label is missing: the pair then teaches the other dimensions
    only. In the policy view each question is taken once; in its predict split every row is kept, and its labels
    are the levels to ask for.

    Args:
        path: Table of the training rows: a file (``.csv``, ``.tsv``, ``.jsonl``, ``.json`` with one object per
            line, ``.parquet``; ``.gz`` allowed), or the name of a Hub data set.
        train: Split of the Hub data set to train on.
        validation: File or, with a Hub name in ``path``, split of the validation rows.
        test: The same for the test rows.
        predict: The same for the rows of ``predict``.
        validation_share: Share of the training table's questions kept for validation, if ``validation`` is not
            given. A question is on one side only, with all its answers, whatever the seed.
        test_share: The same for the test.
        question: Column of the question.
        answer: Column of the answer.
        columns: Column of a dimension's labels, where it does not have the dimension's name.
        scales: How the values of a dimension's column become levels, where they are not levels already.
        subset: Column with the part that metrics are reported for separately, e.g. a language.
        only_observed: Whether only combinations of levels that some training row has count as reachable.
    """

    def __init__(
        self,
        path: str,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        validation_share: float = 0.0,
        test_share: float = 0.0,
        question: str = "question",
        answer: str = "answer",
        columns: dict[str, str] | None = None,
        scales: dict[str, Scale] | None = None,
        subset: str | None = None,
        only_observed: bool = False,
    ) -> None:
        if min(validation_share, test_share) < 0 or validation_share + test_share >= 1:
            raise ValueError(
                f"validation_share {validation_share} and test_share {test_share} must not be negative "
                "and must leave something to train on"
            )
        self.path = path
        self.train = train
        self.others = {Split.VALIDATION: validation, Split.TEST: test, Split.PREDICT: predict}
        self.shares = {
            Split.TEST: test_share if test is None else 0.0,
            Split.VALIDATION: validation_share if validation is None else 0.0,
        }
        self.question = question
        self.answer = answer
        self.columns = columns or {}
        self.scales = scales or {}
        self.subset = subset
        self.only_observed = only_observed
        self._tables: dict[str | None, list[Record]] = {}
        self._observed: set[Preference] = set()

    def rows(self, view: View, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. The order is that of the table; nothing is drawn."""
        for name in (*self.columns, *self.scales):
            preferences[name]  # an unknown dimension is an error that lists the known ones
        rows = [self._example(record, view, split, preferences) for record in self._records(split)]
        if self.only_observed:
            training = (self._levels(record, preferences) for record in self._records(Split.TRAIN))
            self._observed = {Preference(levels) for levels in training}
        if view is View.POLICY and split is not Split.PREDICT:
            rows = list({_key(row.question): row for row in reversed(rows)}.values())[::-1]
        return rows

    def reachable(self, preference: Preference) -> bool:
        """With ``only_observed``: whether some training row has all these levels at once. Rows must be read first."""
        if not self.only_observed:
            return True
        wanted = preference.levels.items()
        return any(wanted <= row.levels.items() for row in self._observed)

    def _records(self, split: Split) -> list[Record]:
        """The split's part of its table."""
        if split is not Split.TRAIN and (name := self.others[split]) is not None:
            return self._read(name)
        if split is Split.PREDICT:
            return []
        return [record for record in self._read(None) if self._side(record) is split]

    def _read(self, name: str | None) -> list[Record]:
        if name not in self._tables:
            if name is not None and is_file_name(name):
                records = read_file(name)
            elif is_file_name(self.path):
                if name is not None:
                    raise ValueError(
                        f"'{name}' is no table file, and '{self.path}' is no Hub data set to have such a split"
                    )
                records = read_file(self.path)
            else:
                records = read_hub(self.path, name or self.train)
            if not records:
                raise ValueError(f"{name or self.path}: the table has no rows")
            self._tables[name] = records
        return self._tables[name]

    def _side(self, record: Record) -> Split:
        """Where a training row belongs: a function of its question alone."""
        digest = hashlib.sha256(_key(self._question(record)).encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for split, share in self.shares.items():
            if place < share:
                return split
            place -= share
        return Split.TRAIN

    def _example(self, record: Record, view: View, split: Split, preferences: PreferenceSet) -> Example:
        answer = record.fields.get(self.answer)
        if view is not View.POLICY:
            answer = self._field(record, self.answer, "answer")
            if not isinstance(answer, str):
                raise ValueError(f"{record.place}, field '{self.answer}': the answer is {answer!r}, not a text")
        levels = self._levels(record, preferences, required=view is View.REWARD and split is not Split.PREDICT)
        subset = None if self.subset is None else str(self._field(record, self.subset, "subset"))
        return Example(self._question(record), answer, levels, subset)

    def _question(self, record: Record) -> Question:
        question = self._field(record, self.question, "question")
        if not question or (isinstance(question, str) and not question.strip()):
            raise ValueError(f"{record.place}, field '{self.question}': the question is empty")
        try:
            as_messages(question)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{record.place}, field '{self.question}': {error}") from error
        return question

    def _levels(self, record: Record, preferences: PreferenceSet, required: bool = False) -> dict[str, int]:
        levels = {}
        for dimension in preferences.dimensions:
            column = self.columns.get(dimension.name, dimension.name)
            if column not in record.fields and not required and dimension.name not in self.columns:
                continue
            value = self._field(record, column, f"columns.{dimension.name}")
            if is_missing(value):
                continue
            where = f"{record.place}, field '{column}'"
            try:
                level = self.scales.get(dimension.name, Scale()).level(value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not 0 <= level < len(dimension.levels):
                raise ValueError(
                    f"{where}: value {value!r} is level {level}, outside 0..{len(dimension.levels) - 1} of dimension "
                    f"'{dimension.name}'; change its levels or give scales.{dimension.name}"
                )
            levels[dimension.name] = level
        return levels

    def _field(self, record: Record, column: str, argument: str) -> Any:
        if column not in record.fields:
            raise ValueError(
                f"{record.place}: no field '{column}'; there are: {', '.join(record.fields)}. "
                f"Name the right one in `{argument}` of the Table"
            )
        return record.fields[column]


def _key(question: Question) -> str:
    """Questions that differ in case or white space only count as the same."""
    text = question if isinstance(question, str) else json.dumps(question, sort_keys=True)
    return " ".join(text.casefold().split())
