"""Scores of rows as JSON Lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moslim.data.types import Example
from moslim.levels import expected_level
from moslim.preferences import PreferenceSet


def prediction_rows(rows: Sequence[Example], probs: Tensor, preferences: PreferenceSet) -> list[dict[str, Any]]:
    """Returns one plain record per row: the pair, and per dimension what the classifier thinks of it.

    Args:
        rows: ``B`` examples.
        probs: ``[B, D, K]``.
        preferences: The ``D`` dimensions.
    """
    table = probs.cpu().double()
    levels = table.argmax(-1)
    expected = expected_level(table)
    records = []
    for b, row in enumerate(rows):
        scores: dict[str, dict[str, Any]] = {"probabilities": {}, "levels": {}, "expected": {}}
        for d, dimension in enumerate(preferences.dimensions):
            size = len(dimension.levels)
            scores["probabilities"][dimension.name] = [round(p, 6) for p in table[b, d, :size].tolist()]
            scores["levels"][dimension.name] = int(levels[b, d])
            scores["expected"][dimension.name] = round(expected[b, d].item(), 6)
        records.append({**carried(row), **scores})
    return records


def carried(row: Example) -> dict[str, Any]:
    """What a record says of its row."""
    name = {} if row.id is None else {"id": row.id}
    asked = {"requested": dict(row.requested)} if row.requested else {}
    return {**name, "question": row.question, **asked, "answer": row.answer}
