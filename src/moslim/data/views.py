"""Batch views: the form of a module's batches. A module names its view as ``batch_view``."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.batches import CollateRewards, CollateTexts, Pairs, StreamedPairs, known_levels
from moslim.data.loader import Examples, Remaining
from moslim.data.prompt_batches import (
    CollatePrompts,
    Combinations,
    EvaluationKind,
    FixedPrompts,
    NoInstruction,
    Prompt,
    Request,
    SampledPrompts,
    Sweep,
    requested,
    requests,
)
from moslim.data.prompts import pad_id
from moslim.data.types import Example, RowKind, Split
from moslim.instructions import sample_prompts
from moslim.ops.numerics import derive_seed, evenly_spaced
from moslim.preferences import Preference, PreferenceSet
from moslim.training.identity import Entries, described
from moslim.utils.errors import UsageError

if TYPE_CHECKING:
    from moslim.data.data_module import PreferenceDataModule

Check = Callable[[Example], bool]
"""Function that raises an error for an unusable row, and returns whether text is removed from the row."""


class BatchView(ABC):
    """Base class of batch views: rows to read, the examples made of them, and their collation.

    Subclass it, and make an instance the ``batch_view`` of a module. The methods get the data module, which reads and
    encodes rows; a view has no state of its own.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    """Options in :data:`VIEW_OPTIONS` that this view uses; setting another one is an error."""

    @abstractmethod
    def row_kind(self, split: Split) -> RowKind:
        """Returns the kind of rows to read from the source."""

    @abstractmethod
    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Returns the function that checks every row of a split at the start of a run.

        It raises a :class:`~moslim.utils.errors.UsageError` for an unusable row.
        """

    @abstractmethod
    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Examples:
        """Returns the data set of a split.

        Args:
            data: Data module.
            rows: Usable rows, each with its index in the source.
            split: Part of the source.
        """

    @abstractmethod
    def collate(self, data: PreferenceDataModule, split: Split) -> Callable[[list[Any]], Any]:
        """Returns the function that makes a batch of a list of examples."""

    def rows(self, data: PreferenceDataModule, split: Split) -> list[tuple[int, Example]]:
        """Returns the rows of a split to use, each with its index in the source; by default all."""
        return list(enumerate(data.rows(self.row_kind(split), split)))

    def predict_batches(self, data: PreferenceDataModule) -> Iterable[Any]:
        """Returns the batches of ``predict``, without those that an interrupted run finished.

        Raises:
            UsageError: There are no rows.
        """
        rows = data.usable_rows(Split.PREDICT)
        if not rows:
            raise UsageError("the source has no rows to answer; a Table takes them from data.source.predict")
        examples = self.examples(data, rows, Split.PREDICT)
        done = data.module.rows_done(
            examples.origins, data.eval_batch_size, len(examples) - 1
        )  # at least one batch remains
        return data.in_order(Remaining(examples, done), Split.PREDICT)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """Returns the options that trained weights depend on; checkpoints record and compare them."""
        return {"data.max_length": data.token_limit}


class ServedModule(Protocol):
    """Interface of a module that :class:`~moslim.data.data_module.PreferenceDataModule` serves.

    A module derives from it and defines ``batch_view`` and ``tokenizer``; all else has defaults.
    """

    batch_view: BatchView

    preferences: PreferenceSet | None = None
    """Dimensions of the module, which must equal those of the data module; None = any."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model that reads the batches."""
        raise NotImplementedError

    @property
    def batch_repeats(self) -> int:
        """Number of consecutive times that each training batch is yielded."""
        return 1

    @property
    def pair_limit(self) -> int | None:
        """Most tokens of a text if ``data.max_length`` is not given."""
        return None

    @property
    def row_features(self) -> Callable[[list[list[int]]], Tensor] | None:
        """Function from the token ids of ``N`` texts to features ``[N, H]``; None = batches hold the ids."""
        return None

    def longest(self, wanted: int | None) -> int | None:
        """Returns the most tokens of a text.

        Args:
            wanted: Limit of the data module or of the module; None = not given.

        Raises:
            UsageError: The model cannot read texts of ``wanted`` tokens.
        """
        return wanted

    def rows_done(self, rows: Callable[[], Iterable[Any]], batch_size: int = 1, most: int | None = None) -> int:
        """Returns the number of rows that an interrupted ``predict`` finished.

        Args:
            rows: Function that starts a pass over all rows.
            batch_size: Size of batches; only complete batches are counted.
            most: Upper limit of the result.
        """
        return 0


VIEW_OPTIONS = (
    *("sampler", "scramble", "validation_questions", "test_questions", "combinations", "evaluation_kinds"),
    *("group_by_length", "token_budget"),
)
"""Options of the data module that not every view uses."""


class RewardView(BatchView):
    """Question, answer and levels, for a reward classifier; rejected answers are pairs of their own."""

    options = frozenset({"group_by_length", "token_budget"})

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.LABELLED

    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Refuses rows that no question-answer pair can be made of."""
        encoder = data.pair_encoder(data.token_limit)
        return lambda row: encoder.check(row.question, *_answers(row))

    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Pairs:
        """Returns pairs, with their features if the module has ``row_features``."""
        pairs = Pairs([row for _, row in rows], data.counting_encoder())
        features = data.module.row_features
        if features is not None and rows:
            pairs.compute(features)
        return pairs

    def collate(self, data: PreferenceDataModule, split: Split) -> CollateRewards:
        """See the base class."""
        return CollateRewards(data.preferences, pad_id(data.module.tokenizer))

    def predict_batches(self, data: PreferenceDataModule) -> StreamedPairs:
        """Returns the batches of pairs to score, read one at a time."""

        def rows() -> Iterator[Example]:
            return data.source.stream(RowKind.LABELLED, Split.PREDICT, data.preferences, data.seed)

        collate = self.collate(data, Split.PREDICT)
        return StreamedPairs(rows, data.counting_encoder(), collate, data.eval_batch_size, data.module.rows_done(rows))


class TextView(BatchView):
    """Question and answer, for language-model fine-tuning; the loss is on the answer and its end token."""

    options = frozenset({"group_by_length", "token_budget"})

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.TEXTS

    def preference(self, row: Example, preferences: PreferenceSet, split: Split) -> Preference | None:
        """Returns the levels that the prompt of a row requests; None = no instruction."""
        return None

    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Refuses rows that no question-answer pair can be made of."""
        encoder = data.pair_encoder(data.token_limit)

        def check(row: Example) -> bool:
            return encoder.check(row.question, *_answers(row), preference=self.preference(row, data.preferences, split))

        return check

    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Pairs:
        """Returns pairs. In ``predict``, the answers of rows are ignored."""
        used = [replace(row, answer="") if split is Split.PREDICT else row for _, row in rows]
        preferences = [self.preference(row, data.preferences, split) or Preference() for row in used]
        return Pairs(used, data.counting_encoder(), preferences)

    def collate(self, data: PreferenceDataModule, split: Split) -> CollateTexts:
        """See the base class."""
        return CollateTexts(pad_id(data.module.tokenizer))


class InstructedTextView(TextView):
    """Question with an instruction for the row's levels, and answer, for conditional fine-tuning.

    The instruction names the labelled dimensions of the row; a row without labels has no instruction. In ``predict`` it
    names the requested levels.
    """

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.PROMPTS if split is Split.PREDICT else RowKind.LABELLED

    def preference(self, row: Example, preferences: PreferenceSet, split: Split) -> Preference:
        """Returns the labels of the row; in ``predict``, its requested levels."""
        return _requested_levels(row, preferences) if split is Split.PREDICT else known_levels(row.levels, preferences)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """See the base class; the form of the instruction as well."""
        return {**super().meaning(data), **_instruction(data)}


class PolicyView(BatchView):
    """Question with an instruction, and the requested levels, for a policy.

    In training, the sampler of the data module draws the preference. Validation requests :class:`Sweep` for a few
    questions, the test all :meth:`evaluation_kinds`, and ``predict`` the levels of the rows.
    """

    options = frozenset(VIEW_OPTIONS[:6])

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.PROMPTS

    def rows(self, data: PreferenceDataModule, split: Split) -> list[tuple[int, Example]]:
        """Returns the questions, limited by the options. Validation uses training rows if the source has no others."""
        rows = data.rows(RowKind.PROMPTS, split)
        if split is Split.VALIDATION:
            return spread(rows or data.rows(RowKind.PROMPTS, Split.TRAIN), data.validation_questions)
        if split is Split.TEST and data.test_questions is not None:
            return spread(rows, data.test_questions)
        return list(enumerate(rows))

    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Refuses rows that no prompt can be made of."""
        renderer = data.renderer(data.module.tokenizer)
        if split is Split.PREDICT:
            return lambda row: renderer.check(row.question, _requested_levels(row, data.preferences))
        return lambda row: renderer.check(row.question)

    def evaluation_kinds(self, data: PreferenceDataModule, split: Split) -> Sequence[EvaluationKind]:
        """Returns the kinds of requests for each question of validation or test."""
        if split is Split.VALIDATION:
            return [Sweep()]
        combinations = [Combinations(data.combinations, unseen) for unseen in (False, True)]
        return [Sweep(), NoInstruction(), *combinations, *data.evaluation_kinds]

    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Examples:
        """See the base class."""
        if split is Split.TRAIN:
            questions = [row for _, row in rows]
            return SampledPrompts(questions, data.preferences, data.sampler, data.source, data.seed)
        if split is Split.PREDICT:
            return self._predict_prompts(data, rows)
        kinds = self.evaluation_kinds(data, split)

        def row_requests(index: int) -> list[Request]:
            return requests(kinds, data.preferences, data.source, derive_seed(data.seed, index))

        return requested(rows, [row_requests(index) for index, _ in rows])

    def collate(self, data: PreferenceDataModule, split: Split) -> CollatePrompts:
        """See the base class."""
        return CollatePrompts(data.renderer(data.module.tokenizer), data.scramble and split is Split.TRAIN)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """See the base class; the form of the instruction as well."""
        return {"data.max_length": data.max_length, **_instruction(data)}

    def _predict_prompts(self, data: PreferenceDataModule, rows: list[tuple[int, Example]]) -> FixedPrompts:
        preferences = [_requested_levels(row, data.preferences) for _, row in rows]
        if not any(preferences):
            names = ", ".join(data.preferences.names)
            warnings.warn(f"no row of predict asks for a level: columns named {names} would hold them", stacklevel=2)
        return FixedPrompts([Prompt(row.question, preferences[i], i) for i, (_, row) in enumerate(rows)])


def spread(rows: list[Example], count: int) -> list[tuple[int, Example]]:
    """Returns ``count`` evenly spaced rows, or all if there are fewer, each with its index."""
    return [(index, rows[index]) for index in evenly_spaced(len(rows), count)]


def check_served(module: Any, given: Sequence[str]) -> None:
    """Checks that the data module can serve a module.

    Args:
        module: Module to check.
        given: Options in :data:`VIEW_OPTIONS` that are not at their defaults.

    Raises:
        UsageError: The module lacks a member of :class:`ServedModule`, its ``batch_view`` is no view, or the view does
            not use an option that is given.
    """
    name = type(module).__name__
    members = dict.fromkeys([*ServedModule.__annotations__, *(n for n in vars(ServedModule) if not n.startswith("_"))])
    missing = [member for member in members if not hasattr(type(module), member) and member not in vars(module)]
    if missing:
        raise UsageError(
            f"{name} lacks {', '.join(missing)}, which PreferenceDataModule uses: derive it from "
            "moslim.data.views.ServedModule, too, which has defaults, and set `batch_view` and `tokenizer`"
        )
    view = module.batch_view
    if not isinstance(view, BatchView):
        raise UsageError(
            f"{name}.batch_view is {view!r}: give an instance of a moslim.data.views.BatchView, e.g. TextView()"
        )
    if unused := [f"data.{option}" for option in given if option not in view.options]:
        raise UsageError(
            f"{', '.join(unused)} would have no effect: {name} gets its batches from {type(view).__name__}, which does "
            f"not use {'it' if len(unused) == 1 else 'them'}; leave {'it' if len(unused) == 1 else 'them'} out"
        )


def _answers(row: Example) -> list[str]:
    return [answer for answer in (row.answer, row.rejected) if answer is not None]


def _requested_levels(row: Example, preferences: PreferenceSet) -> Preference:
    """Returns the levels that a row of ``predict`` requests."""
    return known_levels(row.requested or row.levels, preferences)


def _instruction(data: PreferenceDataModule) -> Entries:
    return {
        "data.instruction": described(data.instruction),
        **sample_prompts(data.instruction, data.preferences),
    }
