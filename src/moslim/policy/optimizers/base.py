"""The interface of every policy optimizer, and how several rewards become one score per answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moslim.plugin import Plugin

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass
class GroupScores:
    """What is known of the answers of one rollout. ``G`` prompts, ``n`` answers each, ``D`` dimensions.

    Args:
        total: ``[G, n]`` the mapping function's scalar reward.
        per_dimension: ``[G, n, D]`` its reward per dimension, NaN where inactive.
        sequence_kl: ``[G, n]`` sum of the k1 estimates over the answer's tokens; 0 without a reference.
        penalty: ``[G, n]`` what an answer loses for breaking a rule, e.g. for not ending.
        weights: ``[G, n, D]`` how much each dimension counts in normalise-then-sum; None = equally.
    """

    total: Tensor
    per_dimension: Tensor
    sequence_kl: Tensor
    penalty: Tensor
    weights: Tensor | None = None


@dataclass
class LossParts:
    """A loss and what it is made of.

    Args:
        loss: Scalar with a gradient.
        metrics: Detached scalars to log, by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def normalize_then_sum(per_dimension: Tensor, std_floor: float, weights: Tensor | None = None) -> Tensor:
    """Normalises every dimension within its group, then adds up (GDPO, arXiv 2601.05242, with a softened std).

    ``sum_d w_d (r_d - mean_G r_d) / sqrt(var_G r_d + std_floor^2) / sqrt(sum_d w_d^2)`` over the active dimensions. The
    floor keeps a dimension that is already satisfied from being noise blown up to unit variance; the root keeps prompts
    that name many dimensions from counting more.

    Args:
        per_dimension: ``[G, n, D]``, NaN where inactive; mean and variance are taken over the rest of the group.
        std_floor: In units of the reward.
        weights: ``[G, n, D]``, 0 or more; None = equal ones.

    Returns:
        ``[G, n]``; 0 where no dimension is active.
    """
    active = ~per_dimension.isnan()
    values = per_dimension.nan_to_num()
    answers = active.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(dim=1, keepdim=True) / answers) * active
    scale = (centred.square().sum(dim=1, keepdim=True) / answers + std_floor**2).sqrt().clamp(min=1e-8)
    weight = active.to(values.dtype) if weights is None else active * weights
    return (centred / scale * weight).sum(dim=-1) / weight.square().sum(dim=-1).sqrt().clamp(min=1e-8)


class PolicyOptimizer(Plugin, ABC):
    """Turns scores into advantages, and advantages into a loss.

    Args:
        kl_coef: Weight of the KL divergence to the reference; 0 does without.
        clip_low: How far below 1 the probability ratio may fall before its gradient stops.
        clip_high: How far above 1 it may rise.
        aggregation: ``sum_then_normalize`` takes the mapping function's scalar; ``normalize_then_sum`` normalises
            each dimension's reward within its group first (GDPO).
        std_floor: Softening of the standard deviation in ``normalize_then_sum``, in units of the reward.
    """

    role: ClassVar[str] = "policy_optimizer"
    kl_in_reward: ClassVar[bool]
    """Whether ``kl_coef`` applies to the reward (else the loss)."""

    def __init__(
        self,
        kl_coef: float = 0.05,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Aggregation = "sum_then_normalize",
        std_floor: float = 0.1,
    ) -> None:
        super().__init__()
        if kl_coef < 0:
            raise ValueError(f"policy_optimizer.kl_coef is {kl_coef}: give 0 or more")
        if not 0 < clip_low < 1 or clip_high <= 0:
            raise ValueError(f"policy_optimizer: clip_low {clip_low} must lie in (0, 1), clip_high {clip_high} above 0")
        if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
            raise ValueError(
                f"policy_optimizer.aggregation is '{aggregation}': give 'sum_then_normalize' or 'normalize_then_sum'"
            )
        if std_floor < 0:
            raise ValueError(f"policy_optimizer.std_floor is {std_floor}: give 0 or more")
        self.kl_coef = kl_coef
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.aggregation = aggregation
        self.std_floor = std_floor

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities must be computed."""
        return self.kl_coef > 0

    def scores(self, rewards: GroupScores) -> Tensor:
        """One score per answer ``[G, n]``: the aggregated reward, less the penalty, less the KL if it stands here."""
        if self.aggregation == "normalize_then_sum":
            reward = normalize_then_sum(rewards.per_dimension, self.std_floor, rewards.weights)
        else:
            reward = rewards.total
        score = reward - rewards.penalty
        return score - self.kl_coef * rewards.sequence_kl if self.kl_in_reward else score

    @abstractmethod
    def advantages(self, rewards: GroupScores) -> Tensor:
        """Returns ``[G, n]``: how much better each answer is than what was to be expected."""

    @abstractmethod
    def loss(
        self, logprobs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor, length: int
    ) -> LossParts:
        """Returns the loss of a (mini)batch of ``N`` answers.

        Args:
            logprobs: ``[N, T]`` under the current weights.
            old: ``[N, T]`` when sampled.
            reference: ``[N, T]`` under the reference; None unless ``needs_reference``.
            advantages: ``[N]``.
            mask: ``[N, T]`` bool, up to and including the end-of-sequence token.
            length: The engine's length limit, for constant normalisation.
        """

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """PPO's pessimistic objective (arXiv 1707.06347, eq. 7), and where the clip was active; shapes as given."""
        ratio = log_ratio.clamp(-20, 20).exp()
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        return objective, (ratio * advantages > objective).float()
