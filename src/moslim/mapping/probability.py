"""Rewards from the probability of the requested level: standardised (the mapping of the paper), or its logarithm."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moslim.mapping.base import MappingFunction, RunningLevels
from moslim.preferences import requested_probability
from moslim.utils.errors import UsageError

Scope = Literal["class", "batch", "group", "running"]


class TargetProbability(MappingFunction):
    """Standardised probability of the requested level, averaged over active dimensions (MOSLIM, Eq. 11).

    The reward on a dimension is ``(p_target - mean) / std``. The paper (arXiv 2505.20336) sums over dimensions; the
    mean keeps the scale independent of their number. The paper does not say over what ``mean`` and ``std`` are
    computed, so ``scope`` chooses:

    - ``class``: the levels of one completion's distribution. It depends on the shape only: heads of two levels give +1
      or -1 at any confidence.
    - ``batch``: all completions of the batch, per dimension. Levels that the policy rarely writes get low rewards.
    - ``group``: the completions of one prompt, per dimension.
    - ``running``: all completions so far, per dimension and requested level (:class:`RunningLevels`). A level with
      fewer than ``min_count`` completions is standardised as in ``batch``.

    Standard deviations are those of the population, and all statistics ignore inactive dimensions.

    Args:
        scope: Set over which mean and standard deviation are computed.
        std_floor: Minimum of the standard deviation, on the scale of probabilities.
        reward_clip: Rewards per dimension are clipped to ``[-reward_clip, reward_clip]``.
        decay: Decay of the running statistics per completion; 0.999 averages over about 1000 completions.
        min_count: Completions of a level before its running statistics are used.
    """

    def __init__(
        self,
        scope: Scope = "running",
        std_floor: float = 0.05,
        reward_clip: float = 5.0,
        decay: float = 0.999,
        min_count: int = 32,
    ) -> None:
        if std_floor <= 0:
            raise UsageError(f"std_floor is {std_floor}: it must be positive, groups of equal answers have no spread")
        if scope not in ("class", "batch", "group", "running"):
            raise UsageError(f"scope is '{scope}': give class, batch, group or running")
        if reward_clip <= 0:
            raise UsageError(f"reward_clip is {reward_clip}: it must be positive")
        self.scope = scope
        self.std_floor = std_floor
        self.reward_clip = reward_clip
        self.min_count = min_count
        self._running = RunningLevels(decay)

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[-reward_clip, reward_clip]``."""
        p = requested_probability(probs, targets)
        if self.scope == "class":
            mean, std = self._over_levels(probs)
        elif self.scope == "group":
            mean, std = _over_groups(p, groups)
        else:
            mean, std = _over_groups(p, torch.zeros_like(groups))
        if self.scope == "running":
            mean, std = self._over_rollouts(targets, mean, std)
        return ((p - mean) / std.clamp(min=self.std_floor)).clamp(-self.reward_clip, self.reward_clip)

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Updates the running statistics."""
        if self.scope != "running":
            return
        self._running.update(self.preferences, requested_probability(probs, targets), targets)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics: count, mean and variance by ``dimension/level``."""
        return {"running": self._running.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the running statistics."""
        self._running.load_state_dict(state_dict["running"])

    def _over_levels(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes(probs)
        mean = probs.sum(-1) / sizes
        exists = torch.arange(probs.shape[-1], device=probs.device) < sizes[:, None]
        variance = ((probs - mean[..., None]).square() * exists).sum(-1) / sizes
        return mean, variance.sqrt()

    def _over_rollouts(self, targets: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces ``mean`` and ``std`` by the running statistics of levels with enough completions."""
        level_index = torch.arange(targets.shape[1], device=targets.device), targets.clamp(min=0)
        count, running_mean, running_std = (
            table.to(mean)[level_index] for table in self._running.moments(self.preferences)
        )
        enough = count >= self.min_count
        return torch.where(enough, running_mean, mean), torch.where(enough, running_std, std)


def _over_groups(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over each completion's group, per dimension, without NaN: ``[B, D]`` each."""
    _, index = groups.unique(return_inverse=True)
    present = ~values.isnan()

    def mean_of(x: Tensor) -> Tensor:
        sums, counts = (torch.zeros_like(x).index_add_(0, index, y)[index] for y in (x, present.to(x.dtype)))
        return sums / counts.clamp(min=1)

    filled = values.nan_to_num(nan=0.0)
    mean = mean_of(filled)
    return mean, mean_of((filled - mean).square() * present).sqrt()


class LogProbability(MappingFunction):
    """Log-probability of the requested level, ``max(log p_target, floor)``, averaged over active dimensions.

    Its sum over dimensions is the log-likelihood of the whole request if the heads are independent. Unlike the
    probability, it keeps a slope where completions are far from the request.

    Args:
        floor: Minimum of the log-probability, in nats; -5 is a probability of 0.0067.
    """

    def __init__(self, floor: float = -5.0) -> None:
        if floor >= 0:
            raise UsageError(f"floor is {floor}: it is a log-probability, give a negative number")
        self.floor = floor

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class; values lie in ``[floor, 0]``."""
        return requested_probability(probs, targets).log().clamp(min=self.floor)
