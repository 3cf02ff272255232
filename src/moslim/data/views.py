"""Batch views: the form in which a module gets the rows of a source. A module names its own as ``batch_view``."""

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
"""Refuses a row that no example can be made of; returns whether something is taken out of the row's texts."""


class BatchView(ABC):
    """Form of a module's batches: which rows they hold, how a row becomes an example, how examples are collated.

    Subclass it, and make an instance the ``batch_view`` of a module. The methods are given the data module, whose
    attributes and methods say how rows are read and encoded; a view keeps no state of a run.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    """Options of the data module that this view uses, out of :data:`VIEW_OPTIONS`; setting another is an error."""

    @abstractmethod
    def row_kind(self, split: Split) -> RowKind:
        """Returns the kind of rows that the source is asked for."""

    @abstractmethod
    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Returns the function by which every row of a split is checked when a run begins.

        It raises a :class:`~moslim.utils.errors.UsageError` for a row that cannot be used.
        """

    @abstractmethod
    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Examples:
        """Returns the data set of a split.

        Args:
            data: The data module.
            rows: The rows in use, each with its index in the source.
            split: Part of the source that they are of.
        """

    @abstractmethod
    def collate(self, data: PreferenceDataModule, split: Split) -> Callable[[list[Any]], Any]:
        """Returns the function that makes a batch of a list of examples."""

    def rows(self, data: PreferenceDataModule, split: Split) -> list[tuple[int, Example]]:
        """Returns the rows of a split that the view takes, each with its index in the source; by default all."""
        return list(enumerate(data.rows(self.row_kind(split), split)))

    def predict_batches(self, data: PreferenceDataModule) -> Iterable[Any]:
        """Returns the batches of ``predict``, without those that an interrupted run has finished.

        Raises:
            UsageError: There are no rows.
        """
        rows = data.usable_rows(Split.PREDICT)
        if not rows:
            raise UsageError("the source has no rows to answer; a Table takes them from data.source.predict")
        examples = self.examples(data, rows, Split.PREDICT)
        done = data.module.rows_done(examples.origins, data.eval_batch_size, len(examples) - 1)  # one batch is left
        return data.in_order(Remaining(examples, done), Split.PREDICT)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """Returns options of the data module that give weights their meaning; checkpoints record and compare them."""
        return {"data.max_length": data.token_limit}


class ServedModule(Protocol):
    """Attributes and methods of a module that :class:`~moslim.data.data_module.PreferenceDataModule` uses.

    A module derives from it, names ``batch_view`` and ``tokenizer``, and overrides what its training needs otherwise.
    """

    batch_view: BatchView

    preferences: PreferenceSet | None = None
    """The module's dimensions, which must be those of the data module; None = any."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model that reads the batches."""
        raise NotImplementedError

    @property
    def batch_repeats(self) -> int:
        """How often each training batch is yielded in a row."""
        return 1

    @property
    def pair_limit(self) -> int | None:
        """Most tokens of a text where ``data.max_length`` is not given."""
        return None

    @property
    def row_features(self) -> Callable[[list[list[int]]], Tensor] | None:
        """Function that makes features ``[N, H]`` of the ids of all texts, once; None = batches hold the ids."""
        return None

    def longest(self, wanted: int | None) -> int | None:
        """Returns the most tokens of a text that the model can read, given the limit of the data module.

        Raises:
            UsageError: The model cannot read texts as long as ``wanted``.
        """
        return wanted

    def rows_done(self, rows: Callable[[], Iterable[Any]], batch_size: int = 1, most: int | None = None) -> int:
        """Returns the number of rows that an interrupted ``predict`` has finished.

        Args:
            rows: Begins a pass over all rows.
            batch_size: Only whole batches of this size count.
            most: Most rows that may count.
        """
        return 0


VIEW_OPTIONS = (
    *("sampler", "scramble", "validation_questions", "test_questions", "combinations", "evaluation_kinds"),
    *("group_by_length", "token_budget"),
)
"""Options of the data module that only some views use."""


class RewardView(BatchView):
    """Question, answer and levels, for a reward classifier; rejected answers are rows of their own."""

    options = frozenset({"group_by_length", "token_budget"})

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.LABELLED

    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Refuses rows that no question-answer pair can be made of."""
        encoder = data.pair_encoder(data.token_limit)
        return lambda row: encoder.check(row.question, *_answers(row))

    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Pairs:
        """Returns pairs, with features where the module makes them once instead of in every batch."""
        pairs = Pairs([row for _, row in rows], data.counting_encoder())
        features = data.module.row_features
        if features is not None and rows:
            pairs.compute(features)
        return pairs

    def collate(self, data: PreferenceDataModule, split: Split) -> CollateRewards:
        """See the base class."""
        return CollateRewards(data.preferences, pad_id(data.module.tokenizer))

    def predict_batches(self, data: PreferenceDataModule) -> StreamedPairs:
        """Returns the pairs to be scored, which are read one batch at a time."""

        def rows() -> Iterator[Example]:
            return data.source.stream(RowKind.LABELLED, Split.PREDICT, data.preferences, data.seed)

        collate = self.collate(data, Split.PREDICT)
        return StreamedPairs(rows, data.counting_encoder(), collate, data.eval_batch_size, data.module.rows_done(rows))


class TextView(BatchView):
    """Question and answer, for fine-tuning a language model; the loss is on the answer and its end token."""

    options = frozenset({"group_by_length", "token_budget"})

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.TEXTS

    def preference(self, row: Example, preferences: PreferenceSet, split: Split) -> Preference | None:
        """Returns the levels that the instruction of a row's prompt names; None = there is no instruction."""
        return None

    def check(self, data: PreferenceDataModule, split: Split) -> Check:
        """Refuses rows that no question-answer pair can be made of."""
        encoder = data.pair_encoder(data.token_limit)

        def check(row: Example) -> bool:
            return encoder.check(row.question, *_answers(row), preference=self.preference(row, data.preferences, split))

        return check

    def examples(self, data: PreferenceDataModule, rows: list[tuple[int, Example]], split: Split) -> Pairs:
        """Returns pairs. In ``predict`` questions are to be answered: an answer that a row has is not read."""
        used = [replace(row, answer="") if split is Split.PREDICT else row for _, row in rows]
        wanted = [self.preference(row, data.preferences, split) or Preference() for row in used]
        return Pairs(used, data.counting_encoder(), wanted)

    def collate(self, data: PreferenceDataModule, split: Split) -> CollateTexts:
        """See the base class."""
        return CollateTexts(pad_id(data.module.tokenizer))


class InstructedTextView(TextView):
    """Question with the instruction for the row's levels, and answer, for conditional fine-tuning.

    The instruction names the dimensions that the row is labelled on, and no other; a row without labels has none. In
    ``predict`` it names the levels to ask for.
    """

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.PROMPTS if split is Split.PREDICT else RowKind.LABELLED

    def preference(self, row: Example, preferences: PreferenceSet, split: Split) -> Preference:
        """Returns the levels that the row has, or asks for in ``predict``."""
        return _wanted(row, preferences) if split is Split.PREDICT else known_levels(row.levels, preferences)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """See the base class; the form of the instruction as well."""
        return {**super().meaning(data), **_instruction(data)}


class PolicyView(BatchView):
    """Question with the instruction for a preference, and the levels asked for, for a policy.

    In training the data module's sampler draws the preference. Validation asks for :class:`Sweep` on a few questions,
    the test for all :meth:`evaluation_kinds`, ``predict`` for the levels that the rows have.
    """

    options = frozenset(VIEW_OPTIONS[:6])

    def row_kind(self, split: Split) -> RowKind:
        """See the base class."""
        return RowKind.PROMPTS

    def rows(self, data: PreferenceDataModule, split: Split) -> list[tuple[int, Example]]:
        """Returns as many questions as the options say; training's for validation where the source has none for it."""
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
            return lambda row: renderer.check(row.question, _wanted(row, data.preferences))
        return lambda row: renderer.check(row.question)

    def evaluation_kinds(self, data: PreferenceDataModule, split: Split) -> Sequence[EvaluationKind]:
        """Returns the kinds of requests that are put to each question of validation or test."""
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
            return self._to_answer(data, rows)
        kinds = self.evaluation_kinds(data, split)

        def asked(index: int) -> list[Request]:
            return requests(kinds, data.preferences, data.source, derive_seed(data.seed, index))

        return requested(rows, [asked(index) for index, _ in rows])

    def collate(self, data: PreferenceDataModule, split: Split) -> CollatePrompts:
        """See the base class."""
        return CollatePrompts(data.renderer(data.module.tokenizer), data.scramble and split is Split.TRAIN)

    def meaning(self, data: PreferenceDataModule) -> Entries:
        """See the base class; the form of the instruction as well."""
        return {"data.max_length": data.max_length, **_instruction(data)}

    def _to_answer(self, data: PreferenceDataModule, rows: list[tuple[int, Example]]) -> FixedPrompts:
        wanted = [_wanted(row, data.preferences) for _, row in rows]
        if not any(wanted):
            names = ", ".join(data.preferences.names)
            warnings.warn(f"no row of predict asks for a level: columns named {names} would hold them", stacklevel=2)
        return FixedPrompts([Prompt(row.question, wanted[i], i) for i, (_, row) in enumerate(rows)])


def spread(rows: list[Example], count: int) -> list[tuple[int, Example]]:
    """Returns ``count`` rows at equal distances, or all if there are fewer, each with its index."""
    return [(index, rows[index]) for index in evenly_spaced(len(rows), count)]


def check_served(module: Any, given: Sequence[str]) -> None:
    """Refuses a module that the data module cannot serve.

    Args:
        module: The module.
        given: Options of the data module, out of :data:`VIEW_OPTIONS`, that are not at their defaults.

    Raises:
        UsageError: The module lacks something of :class:`ServedModule`, its ``batch_view`` is no view, or the view does
            not use an option that is given.
    """
    name = type(module).__name__
    wanted = dict.fromkeys([*ServedModule.__annotations__, *(n for n in vars(ServedModule) if not n.startswith("_"))])
    missing = [member for member in wanted if not hasattr(type(module), member) and member not in vars(module)]
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


def _wanted(row: Example, preferences: PreferenceSet) -> Preference:
    """The levels that a row of ``predict`` asks for."""
    return known_levels(row.requested or row.levels, preferences)


def _instruction(data: PreferenceDataModule) -> Entries:
    return {
        "data.instruction": described(data.instruction),
        **sample_prompts(data.instruction, data.preferences),
    }
