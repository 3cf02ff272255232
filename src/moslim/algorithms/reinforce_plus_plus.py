"""REINFORCE++: returns to go, whitened over the whole batch instead of a critic (Hu 2025, arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, PolicyGradient
from moslim.algorithms.functional import LossAggMode, discounted_sums, whiten


@dataclass(eq=False, kw_only=True)
class ReinforcePlusPlus(PolicyGradient):
    """Each token's advantage is what follows it, less the batch's mean, in the batch's standard deviations.

    A token's reward is ``-kl_coef * k1``; the answer's score is added to that of its last token. Returns to go are
    whitened over all tokens of all processes (Bessel-corrected; with ``std_floor: 0`` as in verl; OpenRLHF's is not
    corrected). The loss is PPO's.

    Answers to which no reward applies enter neither the mean nor the deviation. Their returns, penalty and KL alone,
    are shifted by their own mean and scaled by the larger of both deviations, see :func:`whiten`; the baseline form
    compares them with each other only.

    Args:
        baseline: Subtract the mean score of the prompt's answers first (REINFORCE++-baseline, OpenRLHF's
            ``reinforce_baseline``), without dividing by the group's deviation. Without it, one answer per prompt
            will do. OpenRLHF pairs it with k2 in the loss: ``kl_in: loss, kl: k2``.
        gamma: Discount per token.
        loss_agg_mode: How token losses are averaged; ``token_mean`` is verl's.
    """

    loss_agg_mode: LossAggMode = "token_mean"
    baseline: bool = False
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within_unit("gamma")

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        score = self.scores(rewards)
        if self.baseline:
            score = self.compares(score) - rewards.peer_moments(score)[1]
        to_go = discounted_sums(self.token_rewards(rewards, score), self.gamma)
        return whiten(to_go, rewards.mask, self.std_floor, rewards.rewarded[..., None])
