"""PPO with a critic (Schulman et al. 2017, arXiv 1707.06347), for language models (arXiv 2203.02155)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.lora import LoraOptions
from moslim.policy.critic import CriticOptions
from moslim.policy.optimizers.base import GroupScores, LossParts, UpdateBatch
from moslim.policy.optimizers.policy_gradient import PolicyGradient
from moslim.policy.optimizers.reductions import Reduction, whiten
from moslim.policy.optimizers.returns import generalized_advantages


@dataclass(eq=False, kw_only=True)
class PPO(PolicyGradient):
    """Each token's advantage is estimated with a critic that is trained along.

    A token's reward is ``-kl_coef * k1``; the answer's score is added to that of its last token, cut answers
    included (TRL puts it one position later and lengthens the critic's mask). Advantages are GAE, whitened over all
    tokens of all processes; the critic's targets are GAE plus values, before whitening. The value loss is
    ``0.5 * mean max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2)``, as in TRL and verl. Defaults are TRL's, but
    for ``std_floor``: with 0, whitening is TRL's too.

    Args:
        reduction: How token losses are averaged; ``token_mean`` is TRL's. The value loss always is.
        gamma: Discount per token.
        lam: GAE's lambda: 1 trusts the rewards (verl, OpenRLHF), 0 the critic.
        whiten_advantages: Whether advantages are whitened.
        value_coef: Weight of the value loss.
        value_clip: How far a value may move from that of the rollout before its gradient stops; None = any distance.
        critic_lora: Low-rank adapter of the critic's own on the policy's base, which needs ``model.lora``; None = the
            critic is a head on the policy's trunk, and the value loss trains the trunk too.
    """

    reduction: Reduction = "token_mean"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    critic_lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within_unit("gamma")
        self.within_unit("lam")
        self.above("value_coef", 0)
        self.above("value_clip", 0)

    @property
    def critic(self) -> CriticOptions:
        """A value head, with an adapter of its own if one is given."""
        return CriticOptions(self.critic_lora)

    def advantages(self, rewards: GroupScores) -> Tensor:
        surplus = self._surplus(rewards)
        return whiten(surplus, rewards.mask, self.std_floor) if self.whiten_advantages else surplus

    def returns(self, rewards: GroupScores) -> Tensor:
        """What the critic is to learn, ``[G, n, T]``."""
        return self._surplus(rewards) + self._values(rewards)

    def loss(self, batch: UpdateBatch) -> LossParts:
        parts = super().loss(batch)
        value_loss, clipped = self.value_loss(batch)
        metrics = {"value_loss": value_loss.detach(), "value_clip_fraction": clipped}
        return LossParts(parts.loss + self.value_coef * value_loss, parts.metrics | metrics)

    def value_loss(self, batch: UpdateBatch) -> tuple[Tensor, Tensor]:
        """The critic's loss, a scalar, and the share of tokens where the clip was active."""
        if batch.values is None or batch.old_values is None or batch.returns is None:
            raise UsageError("PPO needs the critic's values and returns in the batch")
        error = (batch.values - batch.returns).square()
        if self.value_clip is None:
            worse = error
        else:
            step = (batch.values - batch.old_values).clamp(-self.value_clip, self.value_clip)
            worse = torch.maximum(error, (batch.old_values + step - batch.returns).square())
        loss = 0.5 * batch.reduce(worse, "token_mean")
        return loss, batch.token_mean((worse > error).float())

    def _surplus(self, rewards: GroupScores) -> Tensor:
        per_token = self.token_rewards(rewards, self.scores(rewards))
        return generalized_advantages(per_token, self._values(rewards), rewards.mask, self.gamma, self.lam)

    @staticmethod
    def _values(rewards: GroupScores) -> Tensor:
        if rewards.values is None:
            raise UsageError("PPO needs a critic's values: build the policy with PPO as its policy_optimizer")
        return rewards.values
