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
    """Table with one pair of question and answer per row.

    The columns are the question, the answer (not needed for prompts), and the label of each dimension. A question is a
    text or, in JSON Lines, parquet and on the Hub, a chat ``[{"role": "user", "content": "..."}, ...]`` that ends with
    a user turn. A label is a level 0..K-1, or a value that ``scales`` converts to one. Blank, null and NaN labels are
    missing; the pair then trains the other dimensions only. An empty answer is valid; a null or NaN answer is an
    error. Prompts contain each question once, except in the predict split, where every row is kept and its labels are
    the levels to request.

    Columns may be paths into nested fields: ``ratings.quality``, ``turns.0``, ``raters.*.score`` (see
    :func:`~moslim.data.sources.records.find`). A label that is a list or has several columns holds the votes of several
    raters. The level of the row is the one they agree on (:func:`~moslim.data.types.agreed_level`), and the votes are
    kept.

    Args:
        Files and splits:
        path: Table of the training rows: a file (``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.json``, ``.parquet``;
            text also as ``.gz``, ``.bz2``, ``.xz`` or ``.zip``), a pattern for the files of one table
            (``part-*.parquet``), or the name of a Hub data set or of a folder in its layout. None if only ``predict``
            is read.
        train: Split of the Hub data set to train on.
        validation: Validation rows: a file or, with a Hub name in ``path``, a split.
        test: Test rows: the same.
        predict: Rows of ``predict``: the same. A classifier scores them while they are read; they need no labels.
        validation_share: Share of the training table's questions used for validation if ``validation`` is not given.
            All answers to a question are in one split, independent of the seed.
        test_share: Share of the questions used for the test if ``test`` is not given.
        shared_questions: Action if a validation or test table shares questions with the training table: ``warn``,
            ``drop`` the held-out rows, or ``error``.
        group: Column whose equal values stay in one split and form one cluster in intervals; by default the question.
            ``context.0.text``, the first turn, keeps conversations together.
        folder: Folder of the Hub data set to read; None = all.
        config_name: Configuration of the Hub data set; None = the default.
        encoding: Encoding of the text files, e.g. ``cp1252``; None = that of the byte order mark, else UTF-8.

        Columns:
        question: Column of the question.
        answer: Column of the answer.
        chat: Format of conversations in the question column, if they are neither texts nor the messages above.
        layout: Conversion to rows of one question and one answer, if the table has another shape; the other arguments
            then name the converted columns.
        id: Column that identifies rows, copied into predictions; the table need not have it.
        subset: Column with the subset for which metrics are reported separately, e.g. a language; blank = none.
        where: Values to keep by column, e.g. ``{lang: [en]}``; other rows are dropped. Compared by
            :func:`~moslim.utils.errors.is_same`.
        constants: Values of columns that the table lacks, e.g. the question of a table of summaries.
        requested: Column with the levels by dimension name that a policy was asked for, as its ``predict`` writes
            them; a test then reports how far the labels and the classifier's predictions meet them.
        keep: Columns passed unchanged to reward functions, e.g. a reference answer; None if a row lacks one.

        Labels:
        columns: Label column by dimension name, by default the name itself; a list with one column per rater.
        scales: Conversion of label values to levels by dimension name, by default none.
        counts: Column with the number of raters by dimension name, for dimensions of two levels whose label is the
            share of yes votes; the votes are computed from it.
        only_observed: Whether only combinations of levels that occur in a training row are reachable.

        Comparisons:
        rejected: Column of the rejected answer; null in rows without a comparison. With it, only dimensions in
            ``columns`` must have labels, since comparisons can train the others.
        comparison_dimensions: Dimensions that are compared, or the column that lists them; None = all.
        margin: Column with the margin of the comparison in levels; lists with one entry per rater are averaged.
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
        self._records_by_name: dict[str | None, list[Record]] = {}
        self._observed: set[Preference] = set()

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """See the base class. Rows are in the order of the table and do not depend on the seed."""
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
        """See the base class. Rows to be scored are streamed, unless there is a layout, which needs all rows."""
        name = self.others.get(split)
        if kind is not RowKind.LABELLED or split is not Split.PREDICT or name is None or self.layout is not None:
            yield from self.rows(kind, split, preferences, seed)
            return
        notices, count = Notices(), 0
        for record in filter(self._is_selected, self._scan(name)):
            yield self._example(record, kind, split, preferences, notices)
            count += 1
        if not count:
            raise self._no_rows(name)
        notices.warn(count)

    def reachable(self, preference: Preference) -> bool:
        """With ``only_observed``, whether some training row has all these levels; call :meth:`rows` first."""
        if not self.only_observed:
            return True
        levels = preference.levels.items()
        return any(levels <= observed.levels.items() for observed in self._observed)

    def _records(self, split: Split) -> list[Record]:
        """Rows of a split."""
        if split is not Split.TRAIN and (name := self.others[split]) is not None:
            records = self._read(name)
            if split is Split.PREDICT:
                return records
            training = {self._key(record): record for record in self._records(Split.TRAIN)}
            held_out = [(self._key(record), record) for record in records]
            return without_shared(held_out, training, self.shared_questions)
        if split is Split.PREDICT:
            return []
        splits = self._assigned_splits()
        return [record for record, assigned in zip(self._read(None), splits, strict=True) if assigned is split]

    def _assigned_splits(self) -> list[Split]:
        """Split of each row of the training table."""
        splits = [self._assigned_split(record) for record in self._read(None)]
        for split, share in self.shares.items():
            if share and split not in splits:
                raise UsageError(
                    f"data.source.{split}_share: {share:g} of the questions of {self.path} selects none of its "
                    f"{len(splits)} rows: raise it, or give `{split}`"
                )
        if Split.TRAIN not in splits:
            raise UsageError(
                f"data.source: validation_share and test_share take all {len(splits)} rows of {self.path}: lower them"
            )
        return splits

    def _read(self, name: str | None) -> list[Record]:
        if name not in self._records_by_name:
            records = completed(self._scan(name))
            if self.layout is not None:
                records = self.layout.rows(records)
            selected = [record for record in records if self._is_selected(record)]
            if not selected:
                raise self._no_rows(name) if records else UsageError(f"{name or self.path}: the layout makes no rows")
            self._records_by_name[name] = selected
        return self._records_by_name[name]

    def _no_rows(self, name: str | None) -> UsageError:
        return UsageError(f"{name or self.path}: no row has the values in `where`: {quoted(self.where, 400)}")

    def _scan(self, name: str | None) -> Iterator[Record]:
        for record in self._scan_table(name):
            existing = [column for column in self.constants if record.fields.get(column) is not None]
            if existing:
                raise UsageError(
                    f"{record.place}: has a field '{existing[0]}' already, which `constants` would replace"
                )
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

    def _is_selected(self, record: Record) -> bool:
        conditions = ((require(record, path, "where"), texts) for path, texts in self.where.items())
        return all(value is not None and any(is_same(value, text) for text in texts) for value, texts in conditions)

    def _key(self, record: Record) -> str:
        """Key of the group or question, which determines the split of a row."""
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

    def _assigned_split(self, record: Record) -> Split:
        """Split of a row of the training table, by a hash of its key in [0, 1)."""
        digest = hashlib.sha256(self._key(record).encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        for split, share in self.shares.items():
            if position < share:
                return split
            position -= share
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
        columns = {path: find(record.fields, path) for path in self.keep}
        example = Example(self._question(record), answer, id=self._id(record), columns=columns, place=record.place)
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
        """Whether a dimension needs a label column, since comparisons do not train it."""
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
