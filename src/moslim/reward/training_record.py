"""What a classifier learned from and how well it did, as plain data that travels in its checkpoints."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from moslim.checkpoints import class_path
from moslim.data.module import PreferenceDataModule
from moslim.data.sources.base import Source
from moslim.data.types import Split, View
from moslim.preferences import PreferenceSet
from moslim.reporting import replace_file

Record = dict[str, Any]
_FILE = "training.json"


def save_record(record: Record, folder: Path) -> None:
    """Puts a record into a classifier's folder, for the cards of those that are made of it."""
    replace_file(folder / _FILE, (json.dumps(record, indent=1, allow_nan=True) + "\n").encode())


def saved_record(folder: Path) -> Record:
    """The record in a classifier's folder; empty where there is none."""
    file = folder / _FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def training_record(
    trainer: Trainer, preferences: PreferenceSet, calibration: Mapping[str, Tensor], before: Record
) -> Record:
    """Returns what a model card needs to know of a run.

    Args:
        trainer: The Trainer, in ``fit``.
        preferences: The dimensions.
        calibration: What calibrating the weights came to, by the names it is logged under; it may be of a later time
            than the last validation.
        before: The record of the classifier that the run started from; empty if it has none.

    Returns:
        ``steps``; ``validation``, the last validation's metrics and the calibration's, without ``val/``; and, if the
        rows come from a :class:`~moslim.data.module.PreferenceDataModule`, ``sources``, ``rows`` and ``labels``: how
        often each level of each dimension was given. ``before``, if there is one.
    """
    metrics = {**trainer.callback_metrics, **calibration}.items()
    record: Record = {
        "steps": trainer.global_step,
        "validation": {key.removeprefix("val/"): float(value) for key, value in metrics if key.startswith("val/")},
    }
    if before:
        record["before"] = before
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PreferenceDataModule):
        rows = data.rows(View.REWARD, Split.TRAIN)
        record |= {"sources": _described(data.source), "rows": len(rows), "labels": {}}
        for dimension in preferences.dimensions:
            counts = Counter(row.levels.get(dimension.name) for row in rows)
            record["labels"][dimension.name] = [counts[level] for level in range(len(dimension.levels))]
    return record


def _described(source: Source) -> list[dict[str, Any]]:
    if parts := source.parts():
        return [described for one in parts for described in _described(one)]
    chosen = inspect.signature(type(source)).parameters.values()
    values = {one.name: getattr(source, one.name, None) for one in chosen}
    options = {
        one.name: values[one.name]
        for one in chosen
        if isinstance(values[one.name], (str, int, float)) and values[one.name] != one.default
    }
    return [{"class": class_path(source), "options": options}]
