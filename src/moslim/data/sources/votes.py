"""What several raters' votes come to."""

from __future__ import annotations

import math
from collections.abc import Sequence


def agreed_level(votes: Sequence[int]) -> int:
    """Returns the level nearest to the votes' mean; where two are equally near, the lower one."""
    return math.ceil(sum(votes) / len(votes) - 0.5)
