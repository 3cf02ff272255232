"""What a classifier learned from and how well it did, as plain data that travels in its checkpoints."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from moslim.checkpoints import class_path
from moslim.data.module import PreferenceDataModule
from moslim.data.sources.base import Source
from moslim.data.sources.several import Several
from moslim.data.types import Split, View
from moslim.preferences import PreferenceSet


def training_record(trainer: Trainer, preferences: PreferenceSet, calibration: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what a model card needs to know of a run.

    Args:
        trainer: The Trainer, in ``fit``.
        preferences: The dimensions.
        calibration: What calibrating the weights came to, by the names it is logged under; it may be of a later time
            than the last validation.

    Returns:
        ``steps``; ``validation``, the last validation's metrics and the calibration's, without ``val/``; and, if the
        rows come from a :class:`~moslim.data.module.PreferenceDataModule`, ``sources``, ``rows`` and ``labels``: how
        often each level of each dimension was given.
    """
    metrics = {**trainer.callback_metrics, **calibration}.items()
    record: dict[str, Any] = {
        "steps": trainer.global_step,
        "validation": {key.removeprefix("val/"): float(value) for key, value in metrics if key.startswith("val/")},
    }
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PreferenceDataModule):
        rows = data.rows(View.REWARD, Split.TRAIN)
        record |= {"sources": _described(data.source), "rows": len(rows), "labels": {}}
        for dimension in preferences.dimensions:
            counts = Counter(row.levels.get(dimension.name) for row in rows)
            record["labels"][dimension.name] = [counts[level] for level in range(len(dimension.levels))]
    return record


def _described(source: Source) -> list[dict[str, Any]]:
    if isinstance(source, Several):
        return [described for one in source.sources for described in _described(one)]
    chosen = inspect.signature(type(source)).parameters.values()
    values = {one.name: getattr(source, one.name, None) for one in chosen}
    options = {
        one.name: values[one.name]
        for one in chosen
        if isinstance(values[one.name], (str, int, float)) and values[one.name] != one.default
    }
    return [{"class": class_path(source), "options": options}]
