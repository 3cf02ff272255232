"""What a classifier learned from and how well it did, as plain data in its checkpoints and in its folder."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from moslim.data.module import PreferenceDataModule
from moslim.data.sources.base import Source
from moslim.data.types import Split
from moslim.identity import class_key
from moslim.preferences import PreferenceSet
from moslim.utils.files import write_text

Record = dict[str, Any]
_FILE = "training.json"


def save_record(record: Record, folder: Path) -> None:
    """Puts a record into a classifier's folder, for the cards of those that are made of it."""
    write_text(folder / _FILE, json.dumps(record, indent=1, allow_nan=True) + "\n")


def saved_record(folder: Path) -> Record:
    """The record in a classifier's folder; empty where there is none."""
    file = folder / _FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def training_record(
    trainer: Trainer,
    preferences: PreferenceSet,
    calibration: Mapping[str, Tensor],
    before: Record,
    added: Sequence[str],
) -> Record:
    """Returns what a model card needs to know of a run.

    Args:
        trainer: The Trainer, in ``fit``.
        preferences: The dimensions.
        calibration: What calibrating the weights came to, by the names it is logged under; it may be of a later time
            than the last validation.
        before: The record of the classifier that the run started from; empty if it has none.
        added: The dimensions whose heads alone were trained; empty = all were.

    Returns:
        ``steps``; ``validation``, the last validation's metrics and the calibration's, without ``val/``; and, if the
        rows come from a :class:`~moslim.PreferenceDataModule`, ``sources``, ``rows`` and ``labels``: how
        often each level of each dimension was given. ``before``, if there is one, and
        ``added``, if not all was trained.
    """
    metrics = {**trainer.callback_metrics, **calibration}.items()
    record: Record = {
        "steps": trainer.global_step,
        "validation": {key.removeprefix("val/"): float(value) for key, value in metrics if key.startswith("val/")},
    }
    record |= {"before": before} if before else {}
    record |= {"added": list(added)} if added else {}
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PreferenceDataModule):
        rows = data.rows(data.view.row_kind(Split.TRAIN), Split.TRAIN)
        record |= {"sources": _described(data.source), "rows": len(rows), "labels": {}}
        for dimension in preferences.dimensions:
            counts = Counter(row.levels.get(dimension.name) for row in rows)
            record["labels"][dimension.name] = [counts[level] for level in range(len(dimension.levels))]
    return record


def of_all_runs(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Labels or validation metrics of all heads: of the run that trained each last.

    Args:
        record: The last run's.
        key: ``labels`` or ``validation``, whose keys are made of names parted by ``/``, one of them the dimension's.

    Returns:
        Where heads were added to others, without the means, which are those of some heads only.
    """
    own: dict[str, Any] = record.get(key, {})
    if "added" not in record:
        return own  # all heads were trained: earlier figures are of other weights
    added = set(record["added"])
    earlier = of_all_runs(record.get("before", {}), key).items()
    kept = {name: value for name, value in earlier if not {"mean", *added} & set(name.split("/"))}
    return kept | {name: value for name, value in own.items() if added & set(name.split("/"))}


def _described(source: Source) -> list[dict[str, Any]]:
    chosen = inspect.signature(type(source)).parameters.values()
    values = {one.name: getattr(source, one.name, None) for one in chosen}
    options = {
        one.name: values[one.name]
        for one in chosen
        if isinstance(values[one.name], (str, int, float)) and values[one.name] != one.default
    }
    parts = source.parts()
    own = [{"class": class_key(type(source)), "options": options}] if options or not parts else []
    return own + [described for one in parts for described in _described(one)]
