"""The interface of every policy optimizer, and the base of those that clip a probability ratio.

The interface of every policy optimizer.

What the optimizers that clip a probability ratio have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor

from moslim.algorithms.functional import (
    Aggregation,
    CriticOptions,
    KLController,
    KLEstimator,
    KLPlace,
    LossAggMode,
    check_kl,
    kl_loss,
    normalize_then_sum,
    probability_ratio,
    reduce_tokens,
)
from moslim.plugin import Plugin
from moslim.training.distributed import mean_over_processes
from moslim.utils.errors import UsageError


@dataclass
class AdvantageInputs:
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
class LossInputs:
    """What the loss of ``N`` answers is computed from.

    Args:
        logprobs: ``[N, T]`` under the current weights, with gradient.
        old_logprobs: ``[N, T]`` under the policy before its first step on these completions; until then ``logprobs``
            themselves, so that the ratio is exactly 1 in any precision.
        advantages: ``[N]`` or ``[N, T]``, as ``advantages`` returned them.
        mask: ``[N, T]`` bool, up to and including the end-of-sequence token; empty for answers that are not ``used``.
        max_completion_length: The engine's length limit, for constant normalisation.
        num_generations: Answers per prompt; those of one prompt are adjacent.
        ref_logprobs: ``[N, T]`` under the reference; None unless ``needs_reference``.
        entropy: ``[N, T]`` nats, with gradient; None unless ``needs_entropy``.
        values: ``[N, T]`` the critic's, with gradient; None without a critic, as the next two.
        old_values: ``[N, T]`` when sampled.
        returns: ``[N, T]`` what the critic should have said.
        value_mask: ``[N, T]`` bool, the tokens that the critic learns from: of ``mask``, those of rewarded answers.
        behavior_logprobs: ``[N, T]`` under what the tokens were drawn from; None = the policy of ``old_logprobs``.
        importance_clip: Largest importance weight; None = all are 1.
        step_mask: ``[M, T]`` the masks of all minibatches whose gradients make one step, where they are several.
        step_value_mask: ``[M, T]`` their value masks.
        parts: What the loss is multiplied by, since Lightning takes the mean of those of all minibatches of the step.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    max_completion_length: int
    num_generations: int
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None
    behavior_logprobs: Tensor | None = None
    importance_clip: float | None = None
    step_mask: Tensor | None = None
    step_value_mask: Tensor | None = None
    parts: float = 1

    @property
    def log_ratio(self) -> Tensor:
        """``[N, T]`` log of current over old probability, 0 where masked."""
        return (self.logprobs - self.old_logprobs) * self.mask

    @property
    def log_importance_weight(self) -> Tensor:
        """``[N, T]`` log of old probability over that of the sampler, 0 where masked."""
        return (
            torch.zeros_like(self.old_logprobs)
            if self.behavior_logprobs is None
            else (self.old_logprobs - self.behavior_logprobs) * self.mask
        )

    def importance(self, log_importance_weight: Tensor) -> Tensor:
        """Truncated weights of what another policy sampled (arXiv 1802.01561), shape as given: 1 where none did.

        Args:
            log_importance_weight: Of tokens, or summed over answers.
        """
        if self.importance_clip is None:
            return torch.ones_like(log_importance_weight)
        return log_importance_weight.exp().clamp(max=self.importance_clip)

    def importance_metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """The mean of the weights that the loss is multiplied by, and the share that is truncated; empty without any.

        Args:
            weights: From :meth:`importance`, of tokens ``[N, T]`` or answers ``[N]``.
        """
        if self.behavior_logprobs is None or self.importance_clip is None:
            return {}
        counted = self.mask if weights.dim() == 2 else self.mask.any(dim=1)
        if not counted.any():
            return {}
        weights = weights.detach()[counted]
        return {
            "off_policy/weight": weights.mean(),
            "off_policy/capped": (weights >= self.importance_clip).float().mean(),
        }

    @property
    def token_advantages(self) -> Tensor:
        """``[N, T]``, or ``[N, 1]`` where all tokens of an answer share one."""
        return self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]

    def reduce(self, values: Tensor, loss_agg_mode: LossAggMode) -> Tensor:
        """Averages per-token values ``[N, T]`` to a scalar, see :func:`reduce_tokens`."""
        return reduce_tokens(values, self.mask, loss_agg_mode, self.max_completion_length, self.step_mask, self.parts)

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean over this process's tokens, detached, for metrics."""
        return (values.detach() * self.mask).sum() / self.mask.sum().clamp(min=1)


@dataclass
class LossOutput:
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
    It enters no mean or deviation of rewarded answers, and is compared with its like only: ``AdvantageInputs.peers``.

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
    def weighs_completions(self) -> bool:
        """Whether probability ratio, clip and importance weight are of whole answers, not of tokens."""
        return False

    @property
    def critic(self) -> CriticOptions | None:
        """The critic that the PolicyTrainer is to build and train; None = none is needed."""
        return None

    def scores(self, rewards: AdvantageInputs) -> Tensor:
        """One score per answer ``[G, n]``: the aggregated reward, less the penalty; without any KL.

        Where no reward applies, the score is the negative penalty alone.
        """
        if self.aggregation == "normalize_then_sum":
            return normalize_then_sum(rewards.per_dimension, self.std_floor, rewards.weights) - rewards.penalty
        return rewards.total.masked_fill(~rewards.rewarded, 0.0) - rewards.penalty

    @abstractmethod
    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        """Returns ``[G, n]`` or ``[G, n, T]``: how much better each answer, or token, is than was to be expected."""

    @abstractmethod
    def loss(self, batch: LossInputs) -> LossOutput:
        """Returns the loss of a (mini)batch of answers."""

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """Which answers take part in updates, ``[G, n]`` bool; the others cost nothing there."""
        return torch.ones_like(rewards.total, dtype=torch.bool)

    def returns(self, rewards: AdvantageInputs) -> Tensor | None:
        """What the critic is to learn, ``[G, n, T]``; None without a critic."""
        return None

    def observe(self, rewards: AdvantageInputs) -> None:
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
            raise UsageError(f"{name} compares the answers to a prompt: set num_generations to 2 or more")
        return score


@dataclass(eq=False, kw_only=True)
class PolicyGradient(PolicyOptimizer):
    """Advantage times probability ratio, clipped token by token (PPO's surrogate). A subclass writes ``advantages``.

    Args:
        kl_coef: Weight of the KL divergence to the reference; 0 does without.
        kl_in: ``reward`` subtracts the estimate from the score; ``loss`` adds it to the loss.
        kl: Its estimator: ``k1`` in the reward, ``k2`` or ``k3`` in the loss. Other combinations have no gradient or a
            wrong one and are refused, see :mod:`moslim.algorithms.functional`.
        kl_controller: What changes the weight during training; None = nothing.
        epsilon_low: How far below 1 the probability ratio may fall before its gradient stops.
        epsilon_high: How far above 1 it may rise; above ``epsilon_low`` is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: Bounds the loss of a bad answer that became likelier at this many times its advantage
            (arXiv 1912.09729; verl has 3); None = no bound.
        loss_agg_mode: How token losses are averaged, see :func:`reduce_tokens`.
        entropy_coef: Weight of the mean entropy per token (nats, at the sampler's temperature), which is subtracted
            from the loss. As in TRL it is a mean over tokens whatever the reduction; in verl it follows the reduction.
    """

    kl_coef: float = 0.05
    kl_in: KLPlace = "reward"
    kl: KLEstimator = "k1"
    kl_controller: KLController | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    loss_agg_mode: LossAggMode = "constant"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("loss_agg_mode", get_args(LossAggMode))
        self.at_least("kl_coef", 0)
        self.at_least("entropy_coef", 0)
        self.above("dual_clip", 1)
        check_kl(self.kl_in, self.kl)
        if not 0 < self.epsilon_low < 1 or self.epsilon_high <= 0:
            raise UsageError(
                f"policy_optimizer: epsilon_low {self.epsilon_low} must lie in (0, 1), "
                f"epsilon_high {self.epsilon_high} above 0"
            )
        if self.kl_controller is not None and self.kl_coef == 0:
            raise UsageError("policy_optimizer.kl_coef is 0: a kl_controller would have nothing to multiply")

    @property
    def children(self) -> Sequence[Plugin]:
        """The KL controller, whose state is saved with the optimizer's."""
        return () if self.kl_controller is None else (self.kl_controller,)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities must be computed."""
        return self.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of every token's distribution must be computed."""
        return self.entropy_coef > 0

    @property
    def beta(self) -> float:
        """The weight of the KL divergence at present."""
        return self.kl_coef if self.kl_controller is None else self.kl_coef * self.kl_controller.factor

    def scores_less_kl(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]``: the score of each answer, less its summed KL if that stands in the reward."""
        score = self.scores(rewards)
        return score - self.beta * rewards.sequence_kl if self.kl_in == "reward" else score

    def token_rewards(self, rewards: AdvantageInputs, score: Tensor) -> Tensor:
        """``[G, n, T]``: the score at the last token, less each token's KL at its own if it stands in the reward.

        Args:
            rewards: The rollout.
            score: ``[G, n]``, without any KL.
        """
        steps = rewards.mask.cumsum(dim=-1)
        last = rewards.mask & (steps == steps[..., -1:])
        reward = score[..., None] * last
        return reward - self.beta * rewards.token_kl if self.kl_in == "reward" else reward

    def observe(self, rewards: AdvantageInputs) -> None:
        """Shows the divergence to the KL controller."""
        if self.kl_controller is not None:
            self.kl_controller.observe(mean_over_processes(rewards.sequence_kl.mean()).item())

    def loss(self, batch: LossInputs) -> LossOutput:
        objective, clipped = self.clipped(batch.log_ratio, batch.token_advantages)
        weights = batch.importance(batch.log_importance_weight)
        metrics = {"clip_fraction": batch.token_mean(clipped), **batch.importance_metrics(weights)}
        return self.regularized(self.reduce(-objective * weights, batch), metrics, batch)

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """PPO's pessimistic objective (arXiv 1707.06347, eq. 7), and where a clip was active; shapes as given."""
        ratio = probability_ratio(log_ratio)
        bounded = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        if self.dual_clip is not None:
            objective = objective.where(advantages >= 0, torch.maximum(objective, self.dual_clip * advantages))
        return objective, (objective != ratio * advantages).float()

    def reduce(self, values: Tensor, batch: LossInputs) -> Tensor:
        """Averages per-token values ``[N, T]`` to a scalar."""
        return batch.reduce(values, self.loss_agg_mode)

    def regularized(self, surrogate: Tensor, metrics: dict[str, Tensor], batch: LossInputs) -> LossOutput:
        """Adds the KL divergence where it stands in the loss, reduced as the surrogate, and the entropy bonus."""
        loss = surrogate
        if self.kl_in == "loss" and self.kl_coef > 0 and batch.ref_logprobs is not None:
            estimates = kl_loss(self.kl, batch.logprobs, batch.ref_logprobs, batch.log_ratio)
            divergence = self.reduce(estimates * batch.importance(batch.log_importance_weight), batch)
            loss = loss + self.beta * divergence
            metrics["kl_loss"] = divergence.detach()
        if self.kl_controller is not None:
            metrics["kl_coef"] = torch.tensor(self.beta)
        if batch.entropy is not None:
            entropy = batch.reduce(batch.entropy, "token_mean")
            loss = loss - self.entropy_coef * entropy
            metrics["entropy_bonus"] = entropy.detach()  # nats per token, exact
        return LossOutput(loss, metrics)
