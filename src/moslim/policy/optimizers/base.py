"""The interface of every policy optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.plugin import Plugin
from moslim.policy.critic import CriticOptions
from moslim.policy.optimizers.aggregation import Aggregation, normalize_then_sum
from moslim.policy.optimizers.reductions import Reduction, reduce_tokens


@dataclass
class GroupScores:
    """What is known of the answers of one rollout: ``G`` prompts, ``n`` answers each, ``D`` dimensions, ``T`` tokens.

    Args:
        total: ``[G, n]`` the mapping function's scalar reward.
        per_dimension: ``[G, n, D]`` its reward per dimension and those of reward functions, NaN where inactive.
        penalty: ``[G, n]`` what an answer loses for breaking a rule, e.g. for not ending.
        token_kl: ``[G, n, T]`` k1 estimates of the divergence from the reference; 0 where masked or without one.
        mask: ``[G, n, T]`` bool, up to and including the end-of-sequence token.
        values: ``[G, n, T]`` the critic's, before each token, 0 where masked; None without a critic.
        weights: ``[G, n, D]`` how much each dimension counts in normalise-then-sum; None = equally.
    """

    total: Tensor
    per_dimension: Tensor
    penalty: Tensor
    token_kl: Tensor
    mask: Tensor
    values: Tensor | None = None
    weights: Tensor | None = None

    @property
    def sequence_kl(self) -> Tensor:
        """``[G, n]`` nats per answer."""
        return self.token_kl.sum(dim=-1)

    @property
    def rewarded(self) -> Tensor:
        """``[G, n]`` bool: a dimension or a reward function applies to the answer."""
        return ~self.per_dimension.isnan().all(dim=-1)

    @property
    def peers(self) -> Tensor:
        """``[G, n, n]`` bool: both answers to the prompt are rewarded, or both are not."""
        rewarded = self.rewarded
        return rewarded[:, :, None] == rewarded[:, None, :]

    def peer_moments(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number of each answer's peers, itself included, and their mean and Bessel-corrected variance.

        Args:
            score: ``[G, n]``.

        Returns:
            Three times ``[G, n]``; the variance of an answer without another peer is 0.
        """
        peers = self.peers
        count = peers.sum(dim=-1)
        mean = score[:, None].masked_fill(~peers, 0.0).sum(dim=-1) / count
        squares = (score[:, None] - mean[..., None]).square().masked_fill(~peers, 0.0)
        return count, mean, squares.sum(dim=-1) / (count - 1).clamp(min=1)


@dataclass
class UpdateBatch:
    """What the loss of ``N`` answers is computed from.

    Args:
        logprobs: ``[N, T]`` under the current weights, with gradient.
        old: ``[N, T]`` under the policy before its first step on these answers; until then ``logprobs`` themselves, so
            that the ratio is exactly 1 in any precision.
        advantages: ``[N]`` or ``[N, T]``, as ``advantages`` returned them.
        mask: ``[N, T]`` bool, up to and including the end-of-sequence token; empty for answers that are not ``used``.
        length: The engine's length limit, for constant normalisation.
        samples: Answers per prompt; those of one prompt are adjacent.
        reference: ``[N, T]`` under the reference; None unless ``needs_reference``.
        entropy: ``[N, T]`` nats, with gradient; None unless ``needs_entropy``.
        values: ``[N, T]`` the critic's, with gradient; None without a critic, as the next two.
        old_values: ``[N, T]`` when sampled.
        returns: ``[N, T]`` what the critic should have said.
        value_mask: ``[N, T]`` bool, the tokens that the critic learns from: of ``mask``, those of rewarded answers.
        sampler: ``[N, T]`` under what the tokens were drawn from; None = the policy that ``old`` is of.
        cap: Largest importance weight; None = all are 1.
        step_mask: ``[M, T]`` the masks of all minibatches whose gradients make one step, where they are several.
        step_value_mask: ``[M, T]`` their value masks.
        parts: What the loss is multiplied by, since Lightning takes the mean of those of all minibatches of the step.
    """

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    length: int
    samples: int
    reference: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None
    sampler: Tensor | None = None
    cap: float | None = None
    step_mask: Tensor | None = None
    step_value_mask: Tensor | None = None
    parts: float = 1

    @property
    def log_ratio(self) -> Tensor:
        """``[N, T]`` log of current over old probability, 0 where masked."""
        return (self.logprobs - self.old) * self.mask

    @property
    def log_surplus(self) -> Tensor:
        """``[N, T]`` log of old probability over that of the sampler, 0 where masked."""
        return torch.zeros_like(self.old) if self.sampler is None else (self.old - self.sampler) * self.mask

    def importance(self, log_surplus: Tensor) -> Tensor:
        """Truncated weights of what another policy sampled (arXiv 1802.01561), shape as given: 1 where none did.

        Args:
            log_surplus: Of tokens, or summed over answers.
        """
        if self.cap is None:
            return torch.ones_like(log_surplus)
        return log_surplus.exp().clamp(max=self.cap)

    def importance_metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """The mean of the weights that the loss is multiplied by, and the share that is truncated; empty without any.

        Args:
            weights: From :meth:`importance`, of tokens ``[N, T]`` or answers ``[N]``.
        """
        if self.sampler is None or self.cap is None:
            return {}
        counted = self.mask if weights.dim() == 2 else self.mask.any(dim=1)
        if not counted.any():
            return {}
        weights = weights.detach()[counted]
        return {"off_policy/weight": weights.mean(), "off_policy/capped": (weights >= self.cap).float().mean()}

    @property
    def token_advantages(self) -> Tensor:
        """``[N, T]``, or ``[N, 1]`` where all tokens of an answer share one."""
        return self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """Averages per-token values ``[N, T]`` to a scalar, see :func:`reduce_tokens`."""
        return reduce_tokens(values, self.mask, reduction, self.length, self.step_mask, self.parts)

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean over this process's tokens, detached, for metrics."""
        return (values.detach() * self.mask).sum() / self.mask.sum().clamp(min=1)


@dataclass
class LossParts:
    """A loss and what it is made of.

    Args:
        loss: Scalar with a gradient.
        metrics: Detached scalars to log, by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class PolicyOptimizer(Plugin, ABC):
    """Turns scores into advantages, and advantages into a loss. Name a subclass under ``model.policy_optimizer``.

    An optimizer is a dataclass: its fields are its options, a subclass inherits them and may change a default. It is a
    Lightning callback as well: the Trainer calls its hooks, and what ``state_dict`` returns (plain numbers) goes into
    every checkpoint.

    An answer to which no reward applies (all of ``per_dimension`` is NaN) is neutral. Its score is 0 less the penalty.
    It enters no mean or deviation of rewarded answers, and is compared with its like only: ``GroupScores.peers``.

    Args:
        aggregation: ``sum_then_normalize`` takes the mapping function's scalar; ``normalize_then_sum`` normalises
            each dimension's reward within its group first (GDPO, arXiv 2601.05242).
        std_floor: Softening of every standard deviation that rewards are divided by, ``sqrt(std^2 + floor^2)``, in
            units of the reward.
    """

    role: ClassVar[str] = "policy_optimizer"

    aggregation: Aggregation = "sum_then_normalize"
    std_floor: float = 0.1

    def __post_init__(self) -> None:
        self.one_of("aggregation", get_args(Aggregation))
        self.at_least("std_floor", 0)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities must be computed."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of every token's distribution must be computed."""
        return False

    @property
    def weighs_answers(self) -> bool:
        """Whether probability ratio, clip and importance weight are of whole answers, not of tokens."""
        return False

    @property
    def critic(self) -> CriticOptions | None:
        """The critic that the PolicyTrainer is to build and train; None = none is needed."""
        return None

    def scores(self, rewards: GroupScores) -> Tensor:
        """One score per answer ``[G, n]``: the aggregated reward, less the penalty; without any KL.

        Where no reward applies, the score is the negative penalty alone.
        """
        if self.aggregation == "normalize_then_sum":
            return normalize_then_sum(rewards.per_dimension, self.std_floor, rewards.weights) - rewards.penalty
        return rewards.total.masked_fill(~rewards.rewarded, 0.0) - rewards.penalty

    @abstractmethod
    def advantages(self, rewards: GroupScores) -> Tensor:
        """Returns ``[G, n]`` or ``[G, n, T]``: how much better each answer, or token, is than was to be expected."""

    @abstractmethod
    def loss(self, batch: UpdateBatch) -> LossParts:
        """Returns the loss of a (mini)batch of answers."""

    def used(self, rewards: GroupScores) -> Tensor:
        """Which answers take part in updates, ``[G, n]`` bool; the others cost nothing there."""
        return torch.ones_like(rewards.total, dtype=torch.bool)

    def returns(self, rewards: GroupScores) -> Tensor | None:
        """What the critic is to learn, ``[G, n, T]``; None without a critic."""
        return None

    def observe(self, rewards: GroupScores) -> None:
        """Called once per training rollout, after its advantages: the only place to update state."""

    # Checks, for __post_init__ and advantages -------------------------------------------------------------------

    def one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Refuses an option that is none of the words allowed."""
        if getattr(self, option) not in allowed:
            words = ", ".join(f"'{word}'" for word in allowed)
            raise UsageError(f"policy_optimizer.{option} is '{getattr(self, option)}': give one of {words}")

    def at_least(self, option: str, least: float) -> None:
        """Refuses an option below ``least``; None passes."""
        value = getattr(self, option)
        if value is not None and not value >= least:
            raise UsageError(f"policy_optimizer.{option} is {value}: give {least:g} or more")

    def above(self, option: str, least: float) -> None:
        """Refuses an option that is ``least`` or below; None passes."""
        value = getattr(self, option)
        if value is not None and not value > least:
            raise UsageError(f"policy_optimizer.{option} is {value}: give more than {least:g}")

    def within_unit(self, option: str) -> None:
        """Refuses an option outside of [0, 1]."""
        value = getattr(self, option)
        if not 0 <= value <= 1:
            raise UsageError(f"policy_optimizer.{option} is {value}: give a number from 0 to 1")

    def compares(self, score: Tensor) -> Tensor:
        """Returns ``[G, n]`` scores as they are, and refuses groups of one."""
        if score.shape[1] < 2:
            name = type(self).__name__
            raise UsageError(f"{name} compares the answers to a prompt: set samples_per_prompt to 2 or more")
        return score
