"""The paper's mapping: the standardised probability of the requested level."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moslim.mapping.base import MappingFunction, requested_probability
from moslim.preferences import INACTIVE

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
            raise ValueError(f"std_floor is {std_floor}: it must be positive, groups of equal answers have no spread")
        if scope not in ("class", "batch", "group", "running"):
            raise ValueError(f"scope is '{scope}': give class, batch, group or running")
        if not 0 < decay < 1 or clip <= 0:
            raise ValueError(f"decay is {decay}, clip {clip}: decay must lie between 0 and 1, clip above 0")
        self.scope = scope
        self.std_floor = std_floor
        self.clip = clip
        self.decay = decay
        self.min_count = min_count
        self._running: dict[str, list[float]] = {}  # "dimension/level" -> [count, mean, variance]

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
        p = requested_probability(probs, targets).double()
        for d in range(targets.shape[1]):
            for level in targets[:, d].unique().tolist():
                if level != INACTIVE:
                    self._update(f"{d}/{level}", p[targets[:, d] == level, d])

    def state_dict(self) -> dict[str, Any]:
        """Running statistics: ``dimension/level`` to count, mean, variance."""
        return {"running": {key: list(values) for key, values in self._running.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._running = {key: list(values) for key, values in state_dict["running"].items()}

    def _update(self, key: str, values: Tensor) -> None:
        count, mean, variance = self._running.get(key, [0.0, 0.0, 0.0])
        n = len(values)
        share = max(1 - self.decay**n, n / (count + n))
        shift = values.mean().item() - mean
        spread = values.var(correction=0).item()
        variance = (1 - share) * variance + share * spread + share * (1 - share) * shift**2
        self._running[key] = [count + n, mean + share * shift, variance]

    def _over_classes(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes(probs)
        mean = probs.sum(-1) / sizes
        real = torch.arange(probs.shape[-1], device=probs.device) < sizes[:, None]
        variance = ((probs - mean[..., None]).square() * real).sum(-1) / sizes
        return mean, variance.sqrt()

    def _over_history(self, targets: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = mean.clone(), std.clone()
        for key, (count, seen_mean, seen_variance) in self._running.items():
            d, level = map(int, key.split("/"))
            if count >= self.min_count:
                rows = targets[:, d] == level
                mean[rows, d] = seen_mean
                std[rows, d] = seen_variance**0.5
        return mean, std


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
