"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347), for language models (arXiv 2203.02155)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, LossInputs, LossOutput, PolicyGradient
from moslim.algorithms.functional import (
    CriticOptions,
    LossAggMode,
    discounted_sums,
    generalized_advantages,
    reduce_tokens,
    whiten,
)
from moslim.ops.lora import LoraOptions
from moslim.utils.errors import UsageError


@dataclass(eq=False, kw_only=True)
class PPO(PolicyGradient):
    """Each token's advantage is estimated with a critic that is trained along.

    A token's reward is ``-kl_coef * k1``; the answer's score is added to that of its last token, cut answers
    included (TRL puts it one position later and lengthens the critic's mask). Advantages are GAE, whitened over all
    tokens of all processes; the critic's targets are GAE plus values, before whitening. The value loss is
    ``0.5 * mean max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2)``, as in TRL and verl. Defaults are TRL's, but
    for ``std_floor``: with 0, whitening is TRL's too.

    The critic neither judges nor learns from answers to which no reward applies: the advantage of their tokens is the
    discounted sum of penalty and KL that follow, whitened by a mean of its own and the larger of both deviations, see
    :func:`whiten`.

    Args:
        loss_agg_mode: How token losses are averaged; ``token_mean`` is TRL's. The value loss always is.
        gamma: Discount per token.
        lam: GAE's lambda: 1 trusts the rewards (verl, OpenRLHF), 0 the critic.
        whiten_advantages: Whether advantages are whitened.
        value_coef: Weight of the value loss.
        value_clip: How far a value may move from that of the rollout before its gradient stops; None = any distance.
        critic_lora: Low-rank adapter of the critic's own on the policy's base, which needs ``model.lora``; None = the
            critic is a head on the policy's trunk, and the value loss trains the trunk too.
        critic_lr: Rate of the critic's own weights, its head and adapter, which follow the schedule of all others;
            None = 1e-5, or the policy's rate where that is higher.
    """

    loss_agg_mode: LossAggMode = "token_mean"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    critic_lora: LoraOptions | None = None
    critic_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within_unit("gamma")
        self.within_unit("lam")
        self.above("value_coef", 0)
        self.above("value_clip", 0)
        self.above("critic_lr", 0)

    @property
    def critic(self) -> CriticOptions:
        """A value head, with an adapter of its own if one is given."""
        return CriticOptions(self.critic_lora, self.critic_lr)

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        surplus = self._surplus(rewards)
        if not self.whiten_advantages:
            return surplus
        return whiten(surplus, rewards.mask, self.std_floor, rewards.rewarded[..., None])

    def returns(self, rewards: AdvantageInputs) -> Tensor:
        """What the critic is to learn, ``[G, n, T]``; of no meaning where no reward applies."""
        return self._surplus(rewards) + self._values(rewards)

    def loss(self, batch: LossInputs) -> LossOutput:
        parts = super().loss(batch)
        value_loss, clipped = self.value_loss(batch)
        metrics = {"value_loss": value_loss.detach(), "value_clip_fraction": clipped}
        return LossOutput(parts.loss + self.value_coef * value_loss, parts.metrics | metrics)

    def value_loss(self, batch: LossInputs) -> tuple[Tensor, Tensor]:
        """The critic's loss, a scalar, and the share of tokens where the clip was active."""
        if batch.values is None or batch.old_values is None or batch.returns is None:
            raise UsageError("PPO needs the critic's values and returns in the batch")
        error = (batch.values - batch.returns).square()
        if self.value_clip is None:
            worse = error
        else:
            moved = (batch.values - batch.old_values).clamp(-self.value_clip, self.value_clip)
            worse = torch.maximum(error, (batch.old_values + moved - batch.returns).square())
        mask, step = batch.mask, batch.step_mask
        if batch.value_mask is not None:
            mask, step = batch.value_mask, batch.step_value_mask
        loss = 0.5 * reduce_tokens(worse, mask, "token_mean", batch.max_completion_length, step, batch.parts)
        return loss, ((worse > error) & mask).sum() / mask.sum().clamp(min=1)

    def _surplus(self, rewards: AdvantageInputs) -> Tensor:
        per_token = self.token_rewards(rewards, self.scores(rewards))
        judged = generalized_advantages(per_token, self._values(rewards), rewards.mask, self.gamma, self.lam)
        return judged.where(rewards.rewarded[..., None], discounted_sums(per_token, self.gamma) * rewards.mask)

    @staticmethod
    def _values(rewards: AdvantageInputs) -> Tensor:
        if rewards.values is None:
            raise UsageError("PPO needs a critic's values: build the policy with PPO as its policy_optimizer")
        return rewards.values
