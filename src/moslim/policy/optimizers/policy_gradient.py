"""What the optimizers that clip a probability ratio have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.plugin import Plugin
from moslim.policy.kl import KLEstimator, KLPlace, check_kl, kl_loss, probability_ratio
from moslim.policy.kl_controllers import KLController
from moslim.policy.optimizers.base import GroupScores, LossParts, PolicyOptimizer, UpdateBatch
from moslim.policy.optimizers.reductions import Reduction
from moslim.processes import mean_over_processes


@dataclass(eq=False, kw_only=True)
class PolicyGradient(PolicyOptimizer):
    """Advantage times probability ratio, clipped token by token (PPO's surrogate). A subclass writes ``advantages``.

    Args:
        kl_coef: Weight of the KL divergence to the reference; 0 does without.
        kl_in: ``reward`` subtracts the estimate from the score; ``loss`` adds it to the loss.
        kl: Its estimator: ``k1`` in the reward, ``k2`` or ``k3`` in the loss. Other combinations have no gradient or a
            wrong one and are refused, see :mod:`moslim.policy.kl`.
        kl_controller: What changes the weight during training; None = nothing.
        clip_low: How far below 1 the probability ratio may fall before its gradient stops.
        clip_high: How far above 1 it may rise; above ``clip_low`` is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: Bounds the loss of a bad answer that became likelier at this many times its advantage
            (arXiv 1912.09729; verl has 3); None = no bound.
        reduction: How token losses are averaged, see :func:`reduce_tokens`.
        entropy_coef: Weight of the mean entropy per token (nats, at the sampler's temperature), which is subtracted
            from the loss. As in TRL it is a mean over tokens whatever the reduction; in verl it follows the reduction.
    """

    kl_coef: float = 0.05
    kl_in: KLPlace = "reward"
    kl: KLEstimator = "k1"
    kl_controller: KLController | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: Reduction = "constant"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("reduction", get_args(Reduction))
        self.at_least("kl_coef", 0)
        self.at_least("entropy_coef", 0)
        self.above("dual_clip", 1)
        check_kl(self.kl_in, self.kl)
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise UsageError(
                f"policy_optimizer: clip_low {self.clip_low} must lie in (0, 1), clip_high {self.clip_high} above 0"
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

    def scores_less_kl(self, rewards: GroupScores) -> Tensor:
        """``[G, n]``: the score of each answer, less its summed KL if that stands in the reward."""
        score = self.scores(rewards)
        return score - self.beta * rewards.sequence_kl if self.kl_in == "reward" else score

    def token_rewards(self, rewards: GroupScores, score: Tensor) -> Tensor:
        """``[G, n, T]``: the score at the last token, less each token's KL at its own if it stands in the reward.

        Args:
            rewards: The rollout.
            score: ``[G, n]``, without any KL.
        """
        steps = rewards.mask.cumsum(dim=-1)
        last = rewards.mask & (steps == steps[..., -1:])
        reward = score[..., None] * last
        return reward - self.beta * rewards.token_kl if self.kl_in == "reward" else reward

    def observe(self, rewards: GroupScores) -> None:
        """Shows the divergence to the KL controller."""
        if self.kl_controller is not None:
            self.kl_controller.observe(mean_over_processes(rewards.sequence_kl.mean()).item())

    def loss(self, batch: UpdateBatch) -> LossParts:
        objective, clipped = self.clipped(batch.log_ratio, batch.token_advantages)
        weights = batch.importance(batch.log_surplus)
        metrics = {"clip_fraction": batch.token_mean(clipped), **batch.importance_metrics(weights)}
        return self.regularized(self.reduce(-objective * weights, batch), metrics, batch)

    def clipped(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """PPO's pessimistic objective (arXiv 1707.06347, eq. 7), and where a clip was active; shapes as given."""
        ratio = probability_ratio(log_ratio)
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        if self.dual_clip is not None:
            objective = objective.where(advantages >= 0, torch.maximum(objective, self.dual_clip * advantages))
        return objective, (objective != ratio * advantages).float()

    def reduce(self, values: Tensor, batch: UpdateBatch) -> Tensor:
        """Averages per-token values ``[N, T]`` to a scalar."""
        return batch.reduce(values, self.reduction)

    def regularized(self, surrogate: Tensor, metrics: dict[str, Tensor], batch: UpdateBatch) -> LossParts:
        """Adds the KL divergence where it stands in the loss, reduced as the surrogate, and the entropy bonus."""
        loss = surrogate
        if self.kl_in == "loss" and self.kl_coef > 0 and batch.reference is not None:
            estimates = kl_loss(self.kl, batch.logprobs, batch.reference, batch.log_ratio)
            divergence = self.reduce(estimates * batch.importance(batch.log_surplus), batch)
            loss = loss + self.beta * divergence
            metrics["kl_loss"] = divergence.detach()
        if self.kl_controller is not None:
            metrics["kl_coef"] = torch.tensor(self.beta)
        if batch.entropy is not None:
            entropy = batch.reduce(batch.entropy, "token_mean")
            loss = loss - self.entropy_coef * entropy
            metrics["entropy_bonus"] = entropy.detach()  # nats per token, exact
        return LossParts(loss, metrics)
