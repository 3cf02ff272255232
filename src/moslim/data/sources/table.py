"""Question-answer tables: CSV, JSON Lines, parquet, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from moslim.data.prompts import as_messages
from moslim.data.sources.combined import SharedQuestions, question_key, without_shared
from moslim.data.sources.conversations import ChatFormat, Comparisons, chat_in_text, looks_like_chat
from moslim.data.sources.labels import Labels, Scale, is_missing, levels_of, requested_levels, with_several_votes
from moslim.data.sources.layouts import Layout
from moslim.data.sources.records import Notices, Record, completed, find, require, scan_file, scan_hub
from moslim.data.sources.table_files import is_file_name
from moslim.data.types import Example, Question, RowKind, Source, Split
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import Scalar, UsageError, as_text, is_same, quoted


class Table(Source):
    """Rows of a table, one question-answer pair each.

    Schema: a column with the question; a column with the answer (not needed for prompts); one column per
    dimension with its label. A question is a text, or, in JSON Lines, parquet and on the Hub, the chat so far:
    ``[{"role": "user", "content": "..."}, ...]``, ending with a user turn. A label is a level 0..K-1, or whatever
    ``scales`` turns into one. A blank, null or NaN label is missing: the pair then teaches the other dimensions
    only. An empty answer is an answer; a null or NaN one is an error. Of prompts, each question is taken once;
    in its predict split every row is kept, and its labels are the levels to ask for.

    Wherever a column is named, a path into nested fields will do: ``ratings.quality``, ``turns.0``, ``raters.*.score``
    (:func:`~moslim.data.sources.records.find`). A label that is a list, or has several columns, is the votes of several
    raters: the row's level is what they come to (:func:`~moslim.data.types.agreed_level`), and the votes stay.

    Args:
        Files and splits:
        path: Table of the training rows: a file (``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.json``, ``.parquet``;
            text also as ``.gz``, ``.bz2``, ``.xz`` or ``.zip``), a pattern for the files of one table
            (``part-*.parquet``), or the name of a Hub data set or of a folder in its layout. None where only
            ``predict`` is read.
        train: Split of the Hub data set to train on.
        validation: File or, with a Hub name in ``path``, split of the validation rows.
        test: The same for the test rows.
        predict: The same for the rows of ``predict``. A classifier scores them as they are read; they need no labels.
        validation_share: Share of the training table's questions kept for validation, if ``validation`` is not
            given. A question is on one side only, with all its answers, whatever the seed.
        test_share: The same for the test.
        shared_questions: What to do where a validation or test table asks what the training table asks: ``warn``,
            ``drop`` the held-out rows, or ``error``.
        group: Column whose equal values stay on one side of a split, and count together in intervals, by default the
            question; ``context.0.text``, the first turn, keeps together what was said in one conversation.
        folder: Folder of the Hub data set to read, if not the whole.
        config_name: Configuration of the Hub data set, where it has several.
        encoding: Encoding of the text files, e.g. ``cp1252``; None = what a byte order mark says, else UTF-8.

        Columns:
        question: Column of the question.
        answer: Column of the answer.
        chat: How the question column writes a conversation, where it is neither text nor the messages above.
        layout: What makes rows of one question and one answer, where the table has others; the other arguments then
            name the columns that it makes.
        id: Column that tells rows apart, carried into predictions; the table need not have it.
        subset: Column with the part that metrics are reported for separately, e.g. a language; blank = in no part.
        where: Values to keep, by column, e.g. ``{lang: [en]}``; other rows are left out. Compared as
            :func:`~moslim.utils.errors.is_same` says.
        constants: Columns that the table lacks, with their one value, e.g. the question of a table of summaries.
        requested: Column with the levels that a policy was asked for when it gave the answer, by dimension name, as its
            ``predict`` writes them; a test then tells how far they were met by the labels, and by the classifier.
        keep: Columns that reward functions are given as they are, e.g. a reference answer; None in rows without.

        Labels:
        columns: Column of a dimension's labels, where it does not have the dimension's name; a list of columns where
            each rater has one.
        scales: How the values of a dimension's column become levels, where they are not levels already.
        counts: Column with the number of raters, for a dimension of two levels whose label is the share of raters
            who said yes: their votes follow from it.
        only_observed: Whether only combinations of levels that some training row has count as reachable.

        Comparisons:
        rejected: Column of another answer, which people liked less; null in a row that compares nothing. With it, only
            dimensions in ``columns`` must have labels: comparisons can teach the others.
        comparison_dimensions: Dimensions that the comparisons speak about, or the column that lists them; None = all.
        margin: Column with how clearly the answer was preferred, in levels; of a list, one entry per rater, the mean
            counts, so that disagreement makes the margin small.
    """

    def __init__(
        self,
        path: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        validation_share: float = 0.0,
        test_share: float = 0.0,
        question: str = "question",
        answer: str = "answer",
        columns: dict[str, str | list[str]] | None = None,
        scales: dict[str, Scale] | None = None,
        subset: str | None = None,
        only_observed: bool = False,
        folder: str | None = None,
        config_name: str | None = None,
        rejected: str | None = None,
        comparison_dimensions: str | list[str] | None = None,
        margin: str | None = None,
        counts: dict[str, str] | None = None,
        chat: ChatFormat | None = None,
        layout: Layout | None = None,
        where: dict[str, Scalar | list[Scalar]] | None = None,
        constants: dict[str, Scalar] | None = None,
        requested: str | None = None,
        group: str | None = None,
        id: str = "id",
        keep: list[str] | None = None,
        shared_questions: SharedQuestions = "warn",
        encoding: str | None = None,
    ) -> None:
        if not (validation_share >= 0 and test_share >= 0 and validation_share + test_share < 1):
            raise UsageError(
                f"validation_share {validation_share} and test_share {test_share} must not be negative "
                "and must leave something to train on"
            )
        self.path = path
        self.folder = folder
        self.config_name = config_name
        self.train = train
        self.others = {Split.VALIDATION: validation, Split.TEST: test, Split.PREDICT: predict}
        self.shares = {
            Split.TEST: test_share if test is None else 0.0,
            Split.VALIDATION: validation_share if validation is None else 0.0,
        }
        self.question = question
        self.answer = answer
        self.labels = Labels(columns, scales, counts)
        self.comparisons = Comparisons(rejected, comparison_dimensions, margin)
        self.subset = subset
        self.only_observed = only_observed
        self.chat = chat
        self.layout = layout
        self.where = {
            path: [as_text(text, f"where.{path}") for text in (values if isinstance(values, list) else [values])]
            for path, values in (where or {}).items()
        }
        self.constants = {name: as_text(value, f"constants.{name}") for name, value in (constants or {}).items()}
        self.requested = requested
        self.group = group
        self.id = id
        self.keep = keep or []
        self.shared_questions = shared_questions
        self.encoding = encoding
        self._tables: dict[str | None, list[Record]] = {}
        self._observed: set[Preference] = set()

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. The order is that of the table; nothing is drawn."""
        self.labels.check(preferences)
        self.comparisons.check(preferences)
        notices = Notices()
        rows = [self._example(record, kind, split, preferences, notices) for record in self._records(split)]
        notices.warn(len(rows))
        if kind is RowKind.LABELLED and split is Split.TRAIN:
            names = [name for name in preferences.names if self._must_be_labelled(name)]
            self.labels.warn_if_constant(str(self.path), rows, names)
        if self.only_observed:
            training = (self.labels.votes(record, preferences, required=[]) for record in self._records(Split.TRAIN))
            self._observed = {Preference(levels_of(votes)) for votes in training}
        if kind is RowKind.PROMPTS and split is not Split.PREDICT:
            rows = list({question_key(row.question): row for row in reversed(rows)}.values())[::-1]
        return rows

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """See the base class. Rows to be scored are read one at a time, unless there is a layout, which needs all."""
        name = self.others.get(split)
        if kind is not RowKind.LABELLED or split is not Split.PREDICT or name is None or self.layout is not None:
            yield from self.rows(kind, split, preferences, seed)
            return
        notices, count = Notices(), 0
        for record in filter(self._is_wanted, self._scan(name)):
            yield self._example(record, kind, split, preferences, notices)
            count += 1
        if not count:
            raise self._no_rows(name)
        notices.warn(count)

    def reachable(self, preference: Preference) -> bool:
        """With ``only_observed``: whether some training row has all these levels at once. Rows must be read first."""
        if not self.only_observed:
            return True
        wanted = preference.levels.items()
        return any(wanted <= row.levels.items() for row in self._observed)

    def _records(self, split: Split) -> list[Record]:
        """The split's part of its table."""
        if split is not Split.TRAIN and (name := self.others[split]) is not None:
            records = self._read(name)
            if split is Split.PREDICT:
                return records
            training = {self._key(record): record for record in self._records(Split.TRAIN)}
            held_out = [(self._key(record), record) for record in records]
            return without_shared(held_out, training, self.shared_questions)
        if split is Split.PREDICT:
            return []
        sides = self._sides()
        return [record for record, side in zip(self._read(None), sides, strict=True) if side is split]

    def _sides(self) -> list[Split]:
        """The part of the split that each row of the training table belongs to."""
        sides = [self._side(record) for record in self._read(None)]
        for split, share in self.shares.items():
            if share and split not in sides:
                raise UsageError(
                    f"data.source.{split}_share: {share:g} of the questions of {self.path} selects none of its "
                    f"{len(sides)} rows: raise it, or give `{split}`"
                )
        if Split.TRAIN not in sides:
            raise UsageError(
                f"data.source: validation_share and test_share take all {len(sides)} rows of {self.path}: lower them"
            )
        return sides

    def _read(self, name: str | None) -> list[Record]:
        if name not in self._tables:
            records = completed(self._scan(name))
            if self.layout is not None:
                records = self.layout.rows(records)
            kept = [record for record in records if self._is_wanted(record)]
            if not kept:
                raise self._no_rows(name) if records else UsageError(f"{name or self.path}: the layout makes no rows")
            self._tables[name] = kept
        return self._tables[name]

    def _no_rows(self, name: str | None) -> UsageError:
        return UsageError(f"{name or self.path}: no row has the values in `where`: {quoted(self.where, 400)}")

    def _scan(self, name: str | None) -> Iterator[Record]:
        for record in self._scan_table(name):
            taken = [column for column in self.constants if record.fields.get(column) is not None]
            if taken:
                raise UsageError(f"{record.place}: has a field '{taken[0]}' already, which `constants` would replace")
            yield Record(record.place, {**record.fields, **self.constants})

    def _scan_table(self, name: str | None) -> Iterator[Record]:
        if name is not None and is_file_name(name):
            return scan_file(name, self.encoding)
        if self.path is None:
            raise UsageError("data.source.path is not given, so there is no table to read rows from")
        if not is_file_name(self.path) and not Path(self.path).is_file():
            return scan_hub(self.path, name or self.train, self.folder, self.config_name)
        if name is not None:
            raise UsageError(f"'{name}' is no table file, and '{self.path}' is no Hub data set to have such a split")
        return scan_file(self.path, self.encoding)

    def _is_wanted(self, record: Record) -> bool:
        found = ((require(record, path, "where"), texts) for path, texts in self.where.items())
        return all(value is not None and any(is_same(value, text) for text in texts) for value, texts in found)

    def _key(self, record: Record) -> str:
        """What decides on which side of a split a row is."""
        if self.group is not None:
            return question_key(self._group(record, self.group))
        return question_key(self._question(record))

    def _group(self, record: Record, path: str) -> str:
        value = require(record, path, "group")
        if is_missing(value):
            raise UsageError(
                f"{record.place}, field '{path}': the group is empty: fill it in, or leave such rows out with `where`"
            )
        return str(value)

    def _side(self, record: Record) -> Split:
        """Where a training row belongs: a function of its question alone."""
        digest = hashlib.sha256(self._key(record).encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for split, share in self.shares.items():
            if place < share:
                return split
            place -= share
        return Split.TRAIN

    def _example(
        self, record: Record, kind: RowKind, split: Split, preferences: PreferenceSet, notices: Notices
    ) -> Example:
        answer = find(record.fields, self.answer)
        if kind is not RowKind.PROMPTS:
            answer = require(record, self.answer, "answer")
            if not isinstance(answer, str):
                raise UsageError(f"{record.place}, field '{self.answer}': the answer is {quoted(answer)}, not a text")
            if not answer.strip():
                notices.add("the answer is empty", record.place)
            elif looks_like_chat(answer):
                notices.add("the answer looks like a chat written as JSON, and is taken as a text", record.place)
        kept = {path: find(record.fields, path) for path in self.keep}
        example = Example(self._question(record), answer, id=self._id(record), columns=kept, place=record.place)
        if self.group is not None and kind is RowKind.LABELLED and split is not Split.PREDICT:
            example.group = self._group(record, self.group)
        if self.requested is not None:
            example.requested = requested_levels(record, self.requested, preferences)
        if kind is RowKind.LABELLED and split is Split.PREDICT:
            return example
        required = [name for name in preferences.names if kind is RowKind.LABELLED and self._must_be_labelled(name)]
        votes = self.labels.votes(record, preferences, required)
        example.levels, example.votes = levels_of(votes), with_several_votes(votes)
        for path in self.labels.not_numbers(record, preferences):
            notices.add(f"field '{path}' is NaN, which is no label", record.place)
        if self.subset is not None:
            subset = require(record, self.subset, "subset")
            example.subset = None if is_missing(subset) else str(subset)
        rejected, dimensions, margin = self.comparisons.read(record, preferences)
        if rejected is not None and rejected == answer:
            notices.add("the rejected answer is the answer, so nothing is compared", record.place)
        elif rejected is not None:
            example.rejected, example.comparison_dimensions, example.margin = rejected, dimensions, margin
        return example

    def _id(self, record: Record) -> str | int | None:
        value = find(record.fields, self.id)
        return value if value is None or type(value) is int else str(value)

    def _must_be_labelled(self, name: str) -> bool:
        """Whether the classifier can learn a dimension from its labels alone."""
        return self.comparisons.rejected is None or name in self.labels.columns

    def _question(self, record: Record) -> Question:
        value = require(record, self.question, "question")
        where = f"{record.place}, field '{self.question}'"
        if is_missing(value) or value == []:
            raise UsageError(f"{where}: the question is empty")
        try:
            question: Question = chat_in_text(value) if self.chat is None else self.chat.question(value)
            as_messages(question)
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"{where}: {error}") from error
        return question
