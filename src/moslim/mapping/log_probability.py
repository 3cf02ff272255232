"""Reward by the log-probability of the requested level."""

from __future__ import annotations

from torch import Tensor

from moslim.errors import UsageError
from moslim.levels import requested_probability
from moslim.mapping.base import MappingFunction


class LogProbability(MappingFunction):
    """``max(log p_target, floor)`` per active dimension, then the mean over them.

    Its sum over dimensions is the log-likelihood of the whole request, were the heads independent. It still has a
    slope where the probability itself is almost 0, as it is for requests far from what the policy writes.

    Args:
        floor: Least log-probability, in nats; below it, answers are equally bad. -5 is a probability of 0.0067.
    """

    def __init__(self, floor: float = -5.0) -> None:
        if floor >= 0:
            raise UsageError(f"floor is {floor}: it is a log-probability, give a negative number")
        self.floor = floor

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[floor, 0]``."""
        return requested_probability(probs, targets).log().clamp(min=self.floor)
