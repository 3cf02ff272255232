"""REINFORCE++: returns to go, whitened over the batch (Hu 2025, arXiv 2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, PolicyGradient
from moslim.algorithms.functional import LossAggMode, discounted_sums, whiten


@dataclass(eq=False, kw_only=True)
class ReinforcePlusPlus(PolicyGradient):
    """REINFORCE with returns to go that are whitened over the batch; no critic.

    The token reward is ``r_t = -beta * k1``, plus the score at the last token. The advantage is the return to go
    ``R_t = r_t + gamma R_{t+1}``, whitened over the tokens of all processes. With ``std_floor: 0`` it is verl's;
    OpenRLHF's variance is not Bessel-corrected. The loss is the clipped surrogate of :class:`PolicyGradient`.

    Completions to which no reward applies do not enter these moments, see
    :func:`~moslim.algorithms.functional.whiten`; with ``baseline`` they are compared with each other only.

    Args:
        loss_agg_mode: Reduction of token losses; ``token_mean`` is verl's.
        baseline: Whether the mean score of the prompt's completions is subtracted first, without division by the
            group's deviation (REINFORCE++-baseline, OpenRLHF's ``reinforce_baseline``); it needs ``num_generations`` of
            2 or more. OpenRLHF combines it with k2 in the loss: ``kl_in: loss, kl: k2``.
        gamma: Discount per token.
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
        returns = discounted_sums(self.token_rewards(rewards, score), self.gamma)
        return whiten(returns, rewards.mask, self.std_floor, rewards.rewarded[..., None])
