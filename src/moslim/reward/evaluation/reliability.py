"""How far the tested probabilities can be believed, with the temperatures in use and without."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.preferences import PreferenceSet
from moslim.reporting import Result
from moslim.reward.calibration import calibration_measures, top_reliability
from moslim.reward.evaluation.rows import ScoredRows


def calibration_of(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    """Calibration of every head on its labelled rows.

    Args:
        rows: ``N`` scored answers.
        preferences: The ``D`` dimensions.

    Returns:
        By dimension: ``ece``, ``classwise_ece`` (mean over levels of the error of that level's probability), ``brier``,
        ``rps``, and ``bins`` of the most probable level's reliability: ``confidence``, ``accuracy``, ``count``.
        ``uncalibrated`` holds the same at temperature 1, null where no temperatures are in use. A dimension without
        labels has null.
    """
    found: Result = {}
    for d, (name, size) in enumerate(zip(preferences.names, preferences.sizes, strict=True)):
        labelled = rows.targets[:, d].any(-1)
        targets = rows.targets[labelled, d, :size]
        probs, raw = rows.probs[labelled, d, :size], rows.raw[labelled, d, :size]
        if not len(targets):
            found[name] = None
            continue
        uncalibrated = None if torch.equal(probs, raw) else _figures(raw, targets)
        found[name] = {**_figures(probs, targets), "uncalibrated": uncalibrated}
    return found


def _figures(probs: Tensor, targets: Tensor) -> Result:
    top = top_reliability(probs, targets)
    return {
        **calibration_measures(probs, targets),
        "bins": {
            "confidence": top.confidence,
            "accuracy": top.outcome,
            "count": (top.share * len(targets)).round().long(),
        },
    }
