"""Reward and text views: question-answer pairs as batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from moslim.data.loader import Draw
from moslim.data.prompts import PairEncoder, pad
from moslim.data.types import Example, PairBatch, TextBatch
from moslim.preferences import Preference, PreferenceSet


@dataclass
class Pair:
    """One encoded pair.

    Args:
        prompt: Ids up to the answer.
        answer: Ids of the answer and its end token.
        row: The example, as the source gave it.
    """

    prompt: list[int]
    answer: list[int]
    row: Example


class Pairs(Dataset[Pair]):
    """Encodes rows on first use and keeps the ids.

    Args:
        rows: Rows with answers.
        encoder: Makes the ids.

    Raises:
        ValueError: A row has no answer.
    """

    def __init__(self, rows: list[Example], encoder: PairEncoder) -> None:
        for i, row in enumerate(rows):
            require_answer(i, row)
        self._rows, self._encoder = rows, encoder
        self._encoded: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, draw: Draw) -> Pair:
        """Returns the pair of a row; it is the same in every epoch."""
        if draw.row not in self._encoded:
            row = self._rows[draw.row]
            self._encoded[draw.row] = Pair(*self._encoder.spans(row.question, row.answer or ""), row)
        return self._encoded[draw.row]

    def lengths(self) -> list[int]:
        """Characters of each row: near enough to its tokens to group rows of like length, and free."""
        return [_characters(row) for row in self._rows]


@dataclass
class CollateRewards:
    """Makes a :class:`PairBatch`; labels of dimensions that are not in ``preferences`` are left out."""

    preferences: PreferenceSet
    pad: int

    def __call__(self, pairs: list[Pair]) -> PairBatch:
        """Right-pads the pairs."""
        ids, mask = pad([pair.prompt + pair.answer for pair in pairs], self.pad, left=False)
        levels = torch.stack([self.preferences.encode(known_levels(pair.row, self.preferences)) for pair in pairs])
        return PairBatch(ids, mask, levels, [pair.row for pair in pairs])


@dataclass
class CollateTexts:
    """Makes a :class:`TextBatch`, whose loss is on the answer and its end token only."""

    pad: int

    def __call__(self, pairs: list[Pair]) -> TextBatch:
        """Right-pads the pairs."""
        ids, mask = pad([pair.prompt + pair.answer for pair in pairs], self.pad, left=False)
        labels, _ = pad([[-100] * len(pair.prompt) + pair.answer for pair in pairs], -100, left=False)
        return TextBatch(ids, mask, labels, [pair.row for pair in pairs])


def require_answer(number: int, row: Example) -> str:
    """Returns a row's answer.

    Raises:
        ValueError: There is none.
    """
    if row.answer is None:
        raise ValueError(f"row {number} of the source has no answer, which this view needs: {row.question!r}")
    return row.answer


def known_levels(row: Example, preferences: PreferenceSet) -> Preference:
    """Returns a row's levels, without those of dimensions that are not in use."""
    return Preference({name: level for name, level in row.levels.items() if name in preferences.names})


def _characters(row: Example) -> int:
    question = row.question if isinstance(row.question, str) else "".join(m["content"] for m in row.question)
    return len(question) + len(row.answer or "")
