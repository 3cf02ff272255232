"""Rows (:class:`Example`), batches, and the interface of a data source."""

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
"""Plain text, or the chat so far, which ends with a user turn."""


class RowKind(StrEnum):
    """Kind of rows that a batch view reads from a source."""

    LABELLED = "labelled"
    """Question and answer with the known levels; in ``predict``, answers to score."""
    PROMPTS = "prompts"
    """Questions, each once; in ``predict``, every row, with the levels to request."""
    TEXTS = "texts"
    """Question and answer for plain language modelling; levels are not used."""


class Split(StrEnum):
    """Part of a source."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    PREDICT = "predict"


@dataclass
class Example:
    """One row of a source.

    Args:
        question: Question, or the chat so far.
        answer: Answer; None for a row with a question only.
        levels: Labels: level by dimension name; an absent dimension is not labelled.
        subset: Part of the split with metrics of its own, e.g. a language.
        stage: Position in a training epoch: rows of lower stages come first, each stage in random order. An epoch that
            is cut short does not reach the last stages.
        votes: Level given by each rater, by dimension name, if there are several; ``levels`` then holds the level that
            they agree on (:func:`agreed_level`).
        rejected: Answer to the same question that people preferred less than ``answer``.
        comparison_dimensions: Dimensions that the comparison is about; empty = all.
        margin: Strength of the preference for ``answer`` over ``rejected``, in levels; 0 = unknown.
        requested: Levels by dimension name that a policy was asked for when it generated the answer.
        id: Identifier of the row in the source, copied into predictions.
        group: Name shared by dependent rows, e.g. of the article that they summarise. Calibration and confidence
            intervals keep a group together; None = the rows with the same question.
        columns: Further fields for reward functions, e.g. a reference answer.
        place: Location of the row, e.g. ``ratings.csv, line 7``; None if the source does not know it.
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

    ``B`` pairs of ``T`` tokens, ``D`` dimensions of up to ``K`` levels, ``P`` comparisons of two answers. Rejected
    answers are pairs of their own, after all others and without labels.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``.
        levels: ``[B, D]`` int64, -1 = not labelled.
        targets: ``[B, D, K]`` float, soft labels: share of the raters that gave each level; all 0 = not labelled.
        rows: ``B`` examples.
        chosen: ``[P]`` int64, index of the chosen answer in the batch.
        rejected: ``[P]`` int64, index of the rejected answer in the batch.
        comparison_mask: ``[P, D]`` bool, dimensions that each comparison is about.
        margins: ``[P]`` float, strength of each preference, in levels.
        features: ``[B, H]`` float32 or float64, pooled hidden states from a frozen backbone; ``T`` is 0 then.
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
        targets: ``[B, D]`` int64, requested level, -1 = not requested.
        index: ``[B]`` int64, row of the source; independent of the batch size and the number of processes.
        questions: ``B`` sanitised questions, without the instruction.
        kinds: Name of the :class:`~moslim.data.prompt_batches.EvaluationKind` of each prompt, e.g. ``sweep``; empty
            strings in training.
        columns: In training, ``columns`` of the ``B`` examples; empty if no example has any.
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
        rows: ``B`` examples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: list[Example]


Batch = PairBatch | PromptBatch | TextBatch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns a copy of the batch with its tensors on a device; all other fields are shared."""
    moved = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved


def agreed_level(votes: Sequence[int]) -> int:
    """Returns the level nearest to the mean of the votes; the lower one of two equally near levels."""
    return math.ceil(sum(votes) / len(votes) - 0.5)


class Source(ABC):
    """Base class of data sources. Subclass it, and name the subclass under ``data.source``."""

    @abstractmethod
    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        """Returns the rows of one split, in a fixed order for a fixed seed.

        Args:
            kind: Kind of rows, which says which fields they need.
            split: Part of the source.
            preferences: Dimensions in use; a label outside their levels is an error.
            seed: Seed of all random choices.

        Raises:
            ValueError: A row is invalid; the message names file, line and field.
        """

    def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
        """Yields the same rows one at a time. Override it to avoid loading all rows into memory."""
        yield from self.rows(kind, split, preferences, seed)

    def parts(self) -> Sequence[Source]:
        """Returns the sources that this one combines; empty if it reads tables itself."""
        return ()

    def reachable(self, preference: Preference) -> bool:
        """Whether some answer can have all these levels at once."""
        return True

    def held_out(self, preference: Preference) -> bool:
        """Whether this combination is excluded from training and reserved for the test."""
        return False
