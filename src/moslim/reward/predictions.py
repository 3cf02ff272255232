"""Scores of rows as JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moslim.data.types import Example
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
    expected = (table * torch.arange(table.shape[-1])).sum(-1)
    records = []
    for b, row in enumerate(rows):
        scores: dict[str, dict[str, Any]] = {"probabilities": {}, "levels": {}, "expected": {}}
        for d, dimension in enumerate(preferences.dimensions):
            size = len(dimension.levels)
            scores["probabilities"][dimension.name] = [round(p, 6) for p in table[b, d, :size].tolist()]
            scores["levels"][dimension.name] = int(levels[b, d])
            scores["expected"][dimension.name] = round(expected[b, d].item(), 6)
        records.append({"question": row.question, "answer": row.answer, **scores})
    return records


class JsonLines:
    """A file of records that appears under its name only when it is complete.

    Args:
        path: Where it shall be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("w", encoding="utf-8")

    @classmethod
    def for_trainer(cls, trainer: Trainer, path: str | None) -> JsonLines:
        """The file that ``predict`` writes: ``path``, or ``predictions.jsonl`` in the run's folder.

        Raises:
            ValueError: There are several processes, which would write over one another.
        """
        if trainer.world_size > 1:
            raise ValueError("predict writes one file in order: run it in one process, with trainer.devices = 1")
        return cls(Path(path) if path else Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records."""
        self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def close(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        os.replace(self._part, self.path)
