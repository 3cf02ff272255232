"""Scores of rows as JSON Lines, and which rows an interrupted run has scored already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from moslim.data.types import Example
from moslim.jsonlines import unfinished
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
        records.append({**_carried(row), **scores})
    return records


def rows_scored(path: Path, depends_on: dict[str, Any], rows: Iterable[Example]) -> int:
    """Returns how many rows at the start an interrupted run has scored, so that they can be left out.

    What it left is compared with the rows one by one: 0, with a warning, if they differ anywhere.

    Args:
        path: The file of scores.
        depends_on: What scores depend on besides the rows.
        rows: All rows, from the first.
    """
    count = 0
    remaining = iter(rows)
    for record in unfinished(path, depends_on):
        row = next(remaining, None)
        if row is None or any(record.get(key) != value for key, value in _carried(row).items()):
            rank_zero_warn(f"line {count + 1} of {path}.part is not row {count + 1} of the source: starting anew")
            return 0
        count += 1
    if count:
        rank_zero_info(f"{path}.part holds {count} scored rows: going on after them")
    return count


def _carried(row: Example) -> dict[str, Any]:
    """What a record says of its row."""
    name = {} if row.id is None else {"id": row.id}
    asked = {"requested": dict(row.requested)} if row.requested else {}
    return {**name, "question": row.question, **asked, "answer": row.answer}
