"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347; for language models arXiv 2203.02155)."""

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
    """Proximal policy optimization: advantages per token from a critic that is trained along with the policy.

    The token reward is ``-beta * k1``, plus the score at the last token, truncated completions included (TRL adds it
    one position later). Advantages are GAE (arXiv 1506.02438), whitened over the tokens of all processes. The returns,
    the critic's regression targets, are GAE before whitening plus values. The loss is the clipped surrogate plus
    ``value_coef * 0.5 * mean max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2)``, as in TRL and
    verl. Defaults are TRL's except ``std_floor``; with ``std_floor: 0`` whitening is TRL's too.

    The critic does not learn from completions to which no reward applies. Their advantages are discounted sums of
    penalty and KL, see :func:`~moslim.algorithms.functional.whiten` for their scale.

    Args:
        loss_agg_mode: Reduction of token losses; ``token_mean`` is TRL's. The value loss is always a token mean.
        gamma: Discount per token.
        lam: GAE's lambda: 1 relies on the rewards only (verl, OpenRLHF), 0 on the critic.
        whiten_advantages: Whether advantages are whitened.
        value_coef: Weight of the value loss.
        value_clip: Clip range of values around those of the rollout; None = no clip.
        critic_lora: Low-rank adapter of the critic on the policy's frozen base; needs ``model.lora``. None = the critic
            is a head on the policy's hidden states, and the value loss trains the policy's backbone too.
        critic_lr: Learning rate of the critic's head and adapter, on the schedule of the other weights; None = 1e-5, or
            the policy's rate if that is higher.
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
        """Options of the value head and its adapter."""
        return CriticOptions(self.critic_lora, self.critic_lr)

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        advantages = self._raw_advantages(rewards)
        if not self.whiten_advantages:
            return advantages
        return whiten(advantages, rewards.mask, self.std_floor, rewards.rewarded[..., None])

    def returns(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n, T]`` regression targets of the critic; without meaning where no reward applies."""
        return self._raw_advantages(rewards) + self._values(rewards)

    def loss(self, batch: LossInputs) -> LossOutput:
        output = super().loss(batch)
        value_loss, clipped = self.value_loss(batch)
        metrics = {"value_loss": value_loss.detach(), "value_clip_fraction": clipped}
        return LossOutput(output.loss + self.value_coef * value_loss, output.metrics | metrics)

    def value_loss(self, batch: LossInputs) -> tuple[Tensor, Tensor]:
        """The loss of the critic and the fraction of tokens where the clip is active; two scalars."""
        if batch.values is None or batch.old_values is None or batch.returns is None:
            raise UsageError("PPO needs the critic's values and returns in the batch")
        squared_error = (batch.values - batch.returns).square()
        token_losses = squared_error
        if self.value_clip is not None:
            change = (batch.values - batch.old_values).clamp(-self.value_clip, self.value_clip)
            token_losses = torch.maximum(squared_error, (batch.old_values + change - batch.returns).square())
        mask, step_mask = batch.mask, batch.step_mask
        if batch.value_mask is not None:
            mask, step_mask = batch.value_mask, batch.step_value_mask
        loss = 0.5 * reduce_tokens(
            token_losses, mask, "token_mean", batch.max_completion_length, step_mask, batch.loss_scale
        )
        return loss, ((token_losses > squared_error) & mask).sum() / mask.sum().clamp(min=1)

    def _raw_advantages(self, rewards: AdvantageInputs) -> Tensor:
        """Advantages ``[G, n, T]`` before whitening: GAE, or discounted sums where no reward applies."""
        token_rewards = self.token_rewards(rewards, self.scores(rewards))
        gae = generalized_advantages(token_rewards, self._values(rewards), rewards.mask, self.gamma, self.lam)
        return gae.where(rewards.rewarded[..., None], discounted_sums(token_rewards, self.gamma) * rewards.mask)

    @staticmethod
    def _values(rewards: AdvantageInputs) -> Tensor:
        if rewards.values is None:
            raise UsageError("PPO needs a critic's values: build the policy with PPO as its policy_optimizer")
        return rewards.values
