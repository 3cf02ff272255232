"""The interface of all policy optimizers, and the base class of those that clip a probability ratio.

:class:`AdvantageInputs` and :class:`LossInputs` are the two inputs of an algorithm: rewards of a rollout, and
log-probabilities of a minibatch. Shapes: ``G`` prompts, ``n`` completions per prompt, ``N = G * n`` completions, ``T``
tokens per completion, ``D`` reward dimensions.
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
    """Rewards of one rollout, from which advantages are computed: ``G`` prompts with ``n`` completions each.

    Args:
        total: ``[G, n]`` scalar rewards of the mapping function.
        per_dimension: ``[G, n, D]`` rewards per dimension, then those of reward functions; NaN where inactive.
        penalty: ``[G, n]`` deduction from the score, e.g. ``missing_eos_penalty``.
        token_kl: ``[G, n, T]`` k1 estimates of KL(policy || reference) per token; 0 where masked or without a
            reference.
        mask: ``[G, n, T]`` bool, completion tokens up to and including the end-of-sequence token.
        values: ``[G, n, T]`` values of the critic before each token, 0 where masked; None without a critic.
        weights: ``[G, n, D]`` weights of the dimensions in ``normalize_then_sum``; None = equal weights.
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
        """``[G, n]`` k1 estimates of KL(policy || reference), in nats per completion."""
        return self.token_kl.sum(dim=-1)

    @property
    def rewarded(self) -> Tensor:
        """``[G, n]`` bool: at least one dimension or reward function applies to the completion."""
        return ~self.per_dimension.isnan().all(dim=-1)

    @property
    def peers(self) -> Tensor:
        """``[G, n, n]`` bool: two completions of a prompt are comparable, since both are rewarded or neither is."""
        rewarded = self.rewarded
        return rewarded[:, :, None] == rewarded[:, None, :]

    def peer_moments(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and Bessel-corrected variance of the scores of each completion's peers, itself included.

        Args:
            score: ``[G, n]`` scores.

        Returns:
            Three tensors ``[G, n]``. The variance of a completion without another peer is 0.
        """
        peers = self.peers
        count = peers.sum(dim=-1)
        mean = score[:, None].masked_fill(~peers, 0.0).sum(dim=-1) / count
        squares = (score[:, None] - mean[..., None]).square().masked_fill(~peers, 0.0)
        return count, mean, squares.sum(dim=-1) / (count - 1).clamp(min=1)


@dataclass
class LossInputs:
    """Inputs of the loss of ``N`` completions.

    Args:
        logprobs: ``[N, T]`` log-probabilities under the current weights, with gradient.
        old_logprobs: ``[N, T]`` log-probabilities under the policy before its first optimizer step on the rollout. In
            that first step they are ``logprobs`` detached, so that the ratio is exactly 1 in any precision.
        advantages: ``[N]`` or ``[N, T]``, from :meth:`PolicyOptimizer.advantages`.
        mask: ``[N, T]`` bool, completion tokens up to and including the end-of-sequence token; all False for
            completions that are not :meth:`~PolicyOptimizer.used`.
        max_completion_length: Length limit of completions in tokens, for ``loss_agg_mode: constant``.
        num_generations: Completions per prompt, ``n``; those of one prompt are adjacent.
        ref_logprobs: ``[N, T]`` log-probabilities under the reference; None unless ``needs_reference``.
        entropy: ``[N, T]`` entropy in nats, with gradient; None unless ``needs_entropy``.
        values: ``[N, T]`` values of the critic, with gradient; None without a critic.
        old_values: ``[N, T]`` values of the critic when the rollout was made; None without a critic.
        returns: ``[N, T]`` regression targets of the critic; None without a critic.
        value_mask: ``[N, T]`` bool, the tokens of ``mask`` in rewarded completions: the critic learns from these.
        behavior_logprobs: ``[N, T]`` log-probabilities under the policy that sampled the tokens; None = that of
            ``old_logprobs``.
        importance_clip: Largest importance weight; None = no correction, all weights are 1.
        step_mask: ``[M, T]`` bool, the concatenated masks of all minibatches that make one optimizer step; None =
            ``mask``.
        step_value_mask: ``[M, T]`` bool, the concatenated value masks of the same minibatches.
        loss_scale: Factor of the loss. It undoes the mean over accumulated batches that Lightning takes.
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
    loss_scale: float = 1

    @property
    def log_ratio(self) -> Tensor:
        """``[N, T]`` ``logprobs - old_logprobs``, 0 where masked."""
        return (self.logprobs - self.old_logprobs) * self.mask

    @property
    def log_importance_weight(self) -> Tensor:
        """``[N, T]`` ``old_logprobs - behavior_logprobs``, 0 where masked."""
        if self.behavior_logprobs is None:
            return torch.zeros_like(self.old_logprobs)
        return (self.old_logprobs - self.behavior_logprobs) * self.mask

    def importance(self, log_importance_weight: Tensor) -> Tensor:
        """Truncated importance weights ``min(exp(w), importance_clip)`` (IMPALA, arXiv 1802.01561, section 4.1).

        Args:
            log_importance_weight: ``[N, T]`` of tokens, or ``[N]`` summed over completions.

        Returns:
            Weights of the same shape; all 1 without ``importance_clip``.
        """
        if self.importance_clip is None:
            return torch.ones_like(log_importance_weight)
        return log_importance_weight.exp().clamp(max=self.importance_clip)

    def importance_metrics(self, weights: Tensor) -> dict[str, Tensor]:
        """Mean of the importance weights and the fraction that is truncated; empty without a correction.

        Args:
            weights: From :meth:`importance`, of tokens ``[N, T]`` or completions ``[N]``.
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
        """``[N, T]`` advantages, or ``[N, 1]`` where all tokens of a completion share one."""
        return self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]

    def reduce(self, values: Tensor, loss_agg_mode: LossAggMode) -> Tensor:
        """Reduces per-token values ``[N, T]`` to a scalar, see :func:`~moslim.algorithms.functional.reduce_tokens`."""
        return reduce_tokens(
            values, self.mask, loss_agg_mode, self.max_completion_length, self.step_mask, self.loss_scale
        )

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of ``[N, T]`` values over the tokens of this process, detached, for metrics."""
        return (values.detach() * self.mask).sum() / self.mask.sum().clamp(min=1)


@dataclass
class LossOutput:
    """A loss and its metrics.

    Args:
        loss: Scalar with gradient.
        metrics: Detached scalars to log, by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class PolicyOptimizer(Plugin, ABC):
    """Base class of algorithms: rewards to advantages, and advantages to a loss.

    A subclass implements :meth:`advantages` and :meth:`loss`, and a config names it under ``model.policy_optimizer``.
    It is a dataclass whose fields are its options. It is also a Lightning callback: the Trainer calls its hooks and
    saves its ``state_dict`` (plain numbers) in every checkpoint.

    A completion to which no reward applies (``per_dimension`` is all NaN) is neutral: its score is ``-penalty``, it
    does not enter the statistics of rewarded completions, and it is compared with other neutral ones only (see
    :attr:`AdvantageInputs.peers`).

    Args:
        aggregation: ``sum_then_normalize`` takes the mapping function's scalar reward; ``normalize_then_sum``
            normalises the reward of each dimension within the group, then adds up (GDPO, arXiv 2601.05242).
        std_floor: Floor of every standard deviation that rewards are divided by, ``sqrt(std^2 + std_floor^2)``, in
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
        """Whether ratio, clip and importance weight apply to whole completions instead of tokens."""
        return False

    @property
    def critic(self) -> CriticOptions | None:
        """Options of the critic that the PolicyTrainer builds and trains; None = no critic."""
        return None

    def scores(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]`` scores: aggregated reward minus penalty, without KL; ``-penalty`` where no reward applies."""
        if self.aggregation == "normalize_then_sum":
            return normalize_then_sum(rewards.per_dimension, self.std_floor, rewards.weights) - rewards.penalty
        return rewards.total.masked_fill(~rewards.rewarded, 0.0) - rewards.penalty

    @abstractmethod
    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        """Returns advantages per completion ``[G, n]`` or per token ``[G, n, T]``."""

    @abstractmethod
    def loss(self, batch: LossInputs) -> LossOutput:
        """Returns the loss of a minibatch of completions."""

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]`` bool: the completions that take part in updates; the others are skipped."""
        return torch.ones_like(rewards.total, dtype=torch.bool)

    def returns(self, rewards: AdvantageInputs) -> Tensor | None:
        """``[G, n, T]`` regression targets of the critic; None without a critic."""
        return None

    def observe(self, rewards: AdvantageInputs) -> None:
        """Updates the state of the algorithm. Called once per training rollout, after its advantages."""

    # Checks, for __post_init__ and advantages -------------------------------------------------------------------

    def one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Refuses an option that is not one of the allowed words."""
        if getattr(self, option) not in allowed:
            words = ", ".join(f"'{word}'" for word in allowed)
            raise UsageError(f"policy_optimizer.{option} is '{getattr(self, option)}': give one of {words}")

    def at_least(self, option: str, least: float) -> None:
        """Refuses an option below ``least``; None is accepted."""
        value = getattr(self, option)
        if value is not None and not value >= least:
            raise UsageError(f"policy_optimizer.{option} is {value}: give {least:g} or more")

    def above(self, option: str, least: float) -> None:
        """Refuses an option that is ``least`` or below; None is accepted."""
        value = getattr(self, option)
        if value is not None and not value > least:
            raise UsageError(f"policy_optimizer.{option} is {value}: give more than {least:g}")

    def within_unit(self, option: str) -> None:
        """Refuses an option outside of [0, 1]."""
        value = getattr(self, option)
        if not 0 <= value <= 1:
            raise UsageError(f"policy_optimizer.{option} is {value}: give a number from 0 to 1")

    def compares(self, score: Tensor) -> Tensor:
        """Returns ``[G, n]`` scores unchanged; refuses groups of one completion."""
        if score.shape[1] < 2:
            name = type(self).__name__
            raise UsageError(f"{name} compares the completions of a prompt: set num_generations to 2 or more")
        return score


@dataclass(eq=False, kw_only=True)
class PolicyGradient(PolicyOptimizer):
    """Policy gradient with PPO's clipped surrogate (arXiv 1707.06347, eq. 7). A subclass implements ``advantages``.

    With ``r = exp(logprobs - old_logprobs)``, advantage ``A`` and truncated importance weight ``w``, each token has the
    loss ``-w min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``, reduced by ``loss_agg_mode``.

    Args:
        kl_coef: Weight of KL(policy || reference); 0 = no KL penalty and no reference.
        kl_in: ``reward`` subtracts the estimate from the reward; ``loss`` adds it to the loss.
        kl: Estimator: ``k1`` in the reward, ``k2`` or ``k3`` in the loss. Other combinations have no gradient or a
            biased one and are refused, see :mod:`moslim.algorithms.functional`.
        kl_controller: Controller that changes the weight during training; None = constant weight.
        epsilon_low: Lower clip range: the gradient stops where the ratio is below ``1 - epsilon_low``.
        epsilon_high: Upper clip range, ``1 + epsilon_high``; above ``epsilon_low`` it is DAPO's clip-higher
            (arXiv 2503.14476).
        dual_clip: Bound of the loss for negative advantages: the objective is at least ``dual_clip * A`` (dual-clip
            PPO, arXiv 1912.09729; verl has 3); None = no bound.
        loss_agg_mode: Reduction of token losses, see :func:`~moslim.algorithms.functional.reduce_tokens`.
        entropy_coef: Weight of the mean entropy per token (nats, at the sampling temperature), which is subtracted
            from the loss. It is a mean over tokens in every ``loss_agg_mode``, as in TRL; verl reduces it as the loss.
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
        """The current weight of the KL divergence."""
        return self.kl_coef if self.kl_controller is None else self.kl_coef * self.kl_controller.factor

    def scores_less_kl(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]`` scores, minus ``beta`` times the KL per completion if ``kl_in`` is ``reward``."""
        score = self.scores(rewards)
        return score - self.beta * rewards.sequence_kl if self.kl_in == "reward" else score

    def token_rewards(self, rewards: AdvantageInputs, score: Tensor) -> Tensor:
        """``[G, n, T]`` token rewards: the score at the last token; minus ``beta * token_kl`` if KL is in the reward.

        Args:
            rewards: Rewards of the rollout.
            score: ``[G, n]`` scores without KL.
        """
        steps = rewards.mask.cumsum(dim=-1)
        last = rewards.mask & (steps == steps[..., -1:])
        reward = score[..., None] * last
        return reward - self.beta * rewards.token_kl if self.kl_in == "reward" else reward

    def observe(self, rewards: AdvantageInputs) -> None:
        """Passes the mean KL per completion to the KL controller."""
        if self.kl_controller is not None:
            self.kl_controller.observe(mean_over_processes(rewards.sequence_kl.mean()).item())

    def loss(self, batch: LossInputs) -> LossOutput:
        objective, clipped = self.clipped(batch.log_ratio, batch.token_advantages)
        weights = batch.importance(batch.log_importance_weight)
        metrics = {"clip_fraction": batch.token_mean(clipped), **batch.importance_metrics(weights)}
        return self.regularized(self.reduce(-objective * weights, batch), metrics, batch)

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Clipped surrogate objective (arXiv 1707.06347, eq. 7), with the dual clip (arXiv 1912.09729).

        Args:
            log_ratio: ``[N, T]`` or ``[N]`` log of the probability ratio.
            advantages: A shape that broadcasts to it.

        Returns:
            The objective, and 1.0 where a clip is active else 0.0, both of the shape of ``log_ratio``.
        """
        ratio = probability_ratio(log_ratio)
        bounded = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        if self.dual_clip is not None:
            objective = objective.where(advantages >= 0, torch.maximum(objective, self.dual_clip * advantages))
        return objective, (objective != ratio * advantages).float()

    def reduce(self, values: Tensor, batch: LossInputs) -> Tensor:
        """Reduces per-token values ``[N, T]`` to a scalar by ``loss_agg_mode``."""
        return batch.reduce(values, self.loss_agg_mode)

    def regularized(self, surrogate: Tensor, metrics: dict[str, Tensor], batch: LossInputs) -> LossOutput:
        """Adds the KL penalty if ``kl_in`` is ``loss``, reduced like the surrogate, and subtracts the entropy bonus."""
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
