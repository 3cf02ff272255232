"""Raters who err: several noisy votes in place of a level that is known exactly."""

from __future__ import annotations

import random
from dataclasses import replace

from moslim.data.sources.votes import agreed_level
from moslim.data.types import Example
from moslim.workbench.grammar import LEVELS


def rate(row: Example, raters: int, noise: float, rng: random.Random) -> Example:
    """Returns a row with the votes of raters, and with what they come to as its levels.

    Args:
        row: A row with exact levels.
        raters: How many raters vote on each dimension; one alone leaves no votes, only a level.
        noise: Standard deviation, in levels, of a rater's error, which is normal, rounded and clipped to the levels.
        rng: What makes the errors.
    """
    votes = {
        name: tuple(_clipped(level + round(rng.gauss(0.0, noise)), len(LEVELS[name])) for _ in range(raters))
        for name, level in row.levels.items()
    }
    levels = {name: agreed_level(given) for name, given in votes.items()}
    return replace(row, levels=levels, votes=votes if raters > 1 else {})


def _clipped(level: int, levels: int) -> int:
    return max(0, min(level, levels - 1))
