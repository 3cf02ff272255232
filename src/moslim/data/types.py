"""Rows, examples and batches, and the interface of a data source.

What flows from a source to a module: rows and batches.

What several raters' votes come to.

The interface of every data source.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from moslim.preferences import Preference, PreferenceSet

Message = dict[str, str]
"""One chat turn: ``{"role": ..., "content": ...}``."""

Question = str | list[Message]
"""A question as plain text or as the chat so far, which must not end with an assistant turn."""


class RowKind(StrEnum):
    """Kind of rows that a batch view asks a source for. A source needs to know these three, and no view."""

    LABELLED = "labelled"
    """Question and answer, with the levels that are known; or answers to be scored."""
    PROMPTS = "prompts"
    """Questions, each of them once; to be answered (``predict``), every row, with the levels to ask for."""
    TEXTS = "texts"
    """Question and answer, for plain language modelling; levels do not matter."""


class Split(StrEnum):
    """Which part of a source is asked for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    PREDICT = "predict"


@dataclass
class Example:
    """One row of a source.

    Args:
        question: The question, or the chat so far.
        answer: The answer; None where only questions are given.
        levels: Level by dimension name; a dimension that is absent is not labelled.
        subset: Part of the split that metrics are reported for separately, e.g. a language.
        stage: When in an epoch of training the row comes: rows of lower stages first, each stage in random order. Every
            epoch begins anew; one that is cut short does not reach the last stages.
        votes: Level that each rater gave, by dimension name, where there were several; ``levels`` then holds what they
            come to.
        rejected: Another answer to the question, which people liked less than ``answer``.
        comparison_dimensions: Dimensions that this comparison speaks about; empty = all.
        margin: How clearly ``answer`` was preferred to ``rejected``, in levels; 0 = unknown.
        requested: Level by dimension name that a policy was asked for when it gave the answer.
        id: What the source calls the row, carried into predictions.
        group: What the row has in common with others, besides a question, e.g. the article that was summarised.
            Calibration and intervals take the rows of one group together; None = of one question.
        columns: What else the row says that reward functions are to know, e.g. a reference answer.
        place: Where the row stands, e.g. ``ratings.csv, line 7``; None where the source cannot say.
    """

    question: Question
    answer: str | None = None
    levels: Mapping[str, int] = field(default_factory=dict)
    subset: str | None = None
    stage: int = 0
    votes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rejected: str | None = None
    comparison_dimensions: tuple[str, ...] = ()
    margin: float = 0.0
    requested: Mapping[str, int] = field(default_factory=dict)
    id: str | int | None = None
    group: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    place: str | None = field(default=None, compare=False)


@dataclass
class PairBatch:
    """Batch of :class:`~moslim.data.views.RewardView`, right-padded.

    ``B`` pairs of ``T`` tokens, ``D`` dimensions of up to ``K`` levels, ``P`` comparisons of two answers. The rejected
    answers of comparisons are rows of their own, behind the others and without labels.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.
        levels: ``[B, D]`` int64, -1 = not labelled.
        targets: ``[B, D, K]`` float, share of the raters that gave each level; all 0 where not labelled.
        rows: The ``B`` examples.
        chosen: ``[P]`` int64, row of the chosen answer.
        rejected: ``[P]`` int64, row of the rejected answer.
        comparison_mask: ``[P, D]`` bool, the dimensions that each comparison speaks about.
        margins: ``[P]`` float, how clearly the answer was preferred, in levels.
        features: ``[B, H]`` float32 or finer, pooled hidden states that a frozen backbone has made of the pairs; there
            are no tokens then (``T`` is 0).
    """

    input_ids: Tensor
    attention_mask: Tensor
    levels: Tensor
    targets: Tensor
    rows: list[Example]
    chosen: Tensor
    rejected: Tensor
    comparison_mask: Tensor
    margins: Tensor
    features: Tensor | None = None


@dataclass
class PromptBatch:
    """Batch of :class:`~moslim.data.views.PolicyView`, left-padded. ``B`` prompts of ``P`` tokens, ``D`` dimensions.

    Args:
        input_ids: ``[B, P]``.
        attention_mask: ``[B, P]``.
        targets: ``[B, D]`` int64, requested level, -1 = not mentioned in the prompt.
        index: ``[B]`` int64, row of the source: the same whatever the batch size or number of processes.
        questions: The ``B`` neutralised questions, without the instruction.
        kinds: Name of the :class:`~moslim.data.prompt_batches.EvaluationKind` of each prompt, e.g. ``sweep``; empty
            strings in training.
        columns: In training, the ``B`` rows' own columns, see :class:`Example`; empty if no row has any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    index: Tensor
    questions: list[Question]
    kinds: list[str]
    columns: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass
class TextBatch:
    """Batch of :class:`~moslim.data.views.TextView`, right-padded. ``B`` rows of ``T`` tokens.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.
        labels: ``[B, T]`` int64, -100 on the prompt and on padding; the end-of-sequence token is labelled.
        rows: The ``B`` examples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: list[Example]


Batch = PairBatch | PromptBatch | TextBatch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on a device; the rest is shared."""
    moved = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved


def agreed_level(votes: Sequence[int]) -> int:
    """Returns the level nearest to the votes' mean; where two are equally near, the lower one."""
    return math.ceil(sum(votes) / len(votes) - 0.5)


class Source(ABC):
    """Rows of every kind. Subclass it, and name the subclass under ``data.source``."""

    @abstractmethod
    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """Returns the rows of one split, in a fixed order for a fixed seed.

        Args:
            kind: What the rows must have, see :class:`~moslim.data.types.RowKind`.
            split: Which part is asked for.
            preferences: The dimensions in use; a label outside their levels is an error.
            seed: Seed of everything that is drawn.

        Raises:
            ValueError: A row cannot be used; the message names file, line and field.
        """

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """Yields the same rows one by one. A source that need not hold them all in memory overrides it."""
        yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> Sequence[Source]:
        """The sources that this one reads from; none if it reads tables itself."""
        return ()

    def reachable(self, preference: Preference) -> bool:
        """Whether some answer can have these levels at once. Unreachable ones are not worth asking for."""
        return True

    def held_out(self, preference: Preference) -> bool:
        """Whether this combination is kept from training, to test what was never asked for."""
        return False
