"""Rewards by the probability of the requested level: standardised (the paper's mapping), and as a logarithm.

The paper's mapping: the standardised probability of the requested level.

Reward by the log-probability of the requested level.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moslim.mapping.base import MappingFunction, RunningLevels
from moslim.preferences import requested_probability
from moslim.utils.errors import UsageError

Scope = Literal["class", "batch", "group", "running"]


class TargetProbability(MappingFunction):
    """``(p_target - mean) / std`` per active dimension, then the mean over them (MOSLIM, arXiv 2505.20336, Eq. 11).

    The paper writes a sum; the mean keeps the scale the same however many dimensions a prompt names.

    What the mean and the standard deviation run over can not be read from the paper, so it is an argument. All
    standard deviations are population ones, and all statistics ignore inactive dimensions.

    - ``class``: the levels of one answer's own distribution. Sees only its shape: two-level heads give +1 or -1
      whatever their confidence.
    - ``batch``: all answers of the batch, per dimension. Levels that the policy rarely writes get low rewards.
    - ``group``: the answers to one prompt, per dimension.
    - ``running``: all answers so far, per dimension and requested level: a plain average at first, then one that
      forgets. Until ``min_count`` answers were seen for a level, it is standardised as in ``batch``.

    Args:
        scope: See above.
        std_floor: Least standard deviation, on the scale of probabilities.
        clip: Rewards per dimension are cut to ``[-clip, clip]``.
        decay: ``running`` only: weight that the past keeps per answer; 0.999 remembers about 1000 answers.
        min_count: ``running`` only: answers needed before the running statistics are used.
    """

    def __init__(
        self,
        scope: Scope = "running",
        std_floor: float = 0.05,
        clip: float = 5.0,
        decay: float = 0.999,
        min_count: int = 32,
    ) -> None:
        if std_floor <= 0:
            raise UsageError(f"std_floor is {std_floor}: it must be positive, groups of equal answers have no spread")
        if scope not in ("class", "batch", "group", "running"):
            raise UsageError(f"scope is '{scope}': give class, batch, group or running")
        if clip <= 0:
            raise UsageError(f"clip is {clip}: it must be positive")
        self.scope = scope
        self.std_floor = std_floor
        self.clip = clip
        self.min_count = min_count
        self._running = RunningLevels(decay)

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[-clip, clip]``."""
        p = requested_probability(probs, targets)
        if self.scope == "class":
            mean, std = self._over_classes(probs)
        elif self.scope == "group":
            mean, std = _over_rows(p, groups)
        else:
            mean, std = _over_rows(p, torch.zeros_like(groups))
        if self.scope == "running":
            mean, std = self._over_history(targets, mean, std)
        return ((p - mean) / std.clamp(min=self.std_floor)).clamp(-self.clip, self.clip)

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Updates the running statistics; nothing else changes them."""
        if self.scope != "running":
            return
        self._running.update(self.preferences, requested_probability(probs, targets), targets)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics: ``dimension/level``, by name, to count, mean, variance."""
        return {"running": self._running.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._running.load_state_dict(state_dict["running"])

    def _over_classes(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes(probs)
        mean = probs.sum(-1) / sizes
        real = torch.arange(probs.shape[-1], device=probs.device) < sizes[:, None]
        variance = ((probs - mean[..., None]).square() * real).sum(-1) / sizes
        return mean, variance.sqrt()

    def _over_history(self, targets: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the running statistics in the place of ``mean`` and ``std`` where they rest on enough answers."""
        of_level = torch.arange(targets.shape[1], device=targets.device), targets.clamp(min=0)
        count, seen_mean, seen_std = (table.to(mean)[of_level] for table in self._running.moments(self.preferences))
        known = count >= self.min_count
        return torch.where(known, seen_mean, mean), torch.where(known, seen_std, std)


def _over_rows(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row's group, per column, without the NaN entries. ``[B, D]`` both."""
    _, index = groups.unique(return_inverse=True)
    present = ~values.isnan()

    def mean_of(x: Tensor) -> Tensor:
        sums, counts = (torch.zeros_like(x).index_add_(0, index, y)[index] for y in (x, present.to(x.dtype)))
        return sums / counts.clamp(min=1)

    filled = values.nan_to_num(nan=0.0)
    mean = mean_of(filled)
    return mean, mean_of((filled - mean).square() * present).sqrt()


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
