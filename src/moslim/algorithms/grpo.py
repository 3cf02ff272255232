"""GRPO: group relative policy optimization (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, PolicyGradient
from moslim.algorithms.functional import KLEstimator, KLPlace, LossAggMode, moments

Scale = Literal["group", "batch", "none"]
_EPS = 1e-4


@dataclass(eq=False, kw_only=True)
class GRPO(PolicyGradient):
    """Group relative policy optimization: scores normalised within the group of a prompt's completions.

    ``A_i = (s_i - mean(s)) / (sqrt(var(s) + std_floor^2) + 1e-4)`` with the Bessel-corrected variance
    (arXiv 2402.03300, section 4.1.2); with ``std_floor: 0`` it is TRL's. verl adds 1e-6 and OpenRLHF 1e-9 instead of
    1e-4; NeMo-RL uses leave-one-out moments. The loss is the clipped surrogate plus ``kl_coef`` times k3, see
    :class:`PolicyGradient`.

    Completions to which no reward applies enter neither mean nor variance. They are compared with their own mean in the
    group and divided by the larger of both deviations.

    Args:
        loss_agg_mode: ``token_mean`` (DAPO, TRL's default), ``grpo`` (the paper) or ``constant`` (Dr. GRPO).
        scale: Standard deviation to divide by: that of the ``group``, that of all scores of the ``batch`` (with
            ``normalize_then_sum``, the last step of GDPO, arXiv 2601.05242), or ``none`` (Dr. GRPO, arXiv 2503.20783).
        min_spread: Groups whose scores, without KL, have a standard deviation of at most this are left out of updates
            (DAPO's dynamic sampling, arXiv 2503.14476, without resampling); None = all groups are used.
    """

    kl_in: KLPlace = "loss"
    kl: KLEstimator = "k3"
    loss_agg_mode: LossAggMode = "token_mean"
    scale: Scale = "group"
    min_spread: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("scale", get_args(Scale))
        self.at_least("min_spread", 0)

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        score = self.compares(self.scores_less_kl(rewards))
        _, mean, variance = rewards.peer_moments(score)
        centered, rewarded = score - mean, rewards.rewarded
        if self.scale == "none":
            return centered
        if self.scale == "batch":
            rewarded_variance = moments(score, rewarded)[1]
            variance = torch.where(rewarded, rewarded_variance, moments(score, ~rewarded)[1])
        else:
            rewarded_variance = variance.masked_fill(~rewarded, 0.0).amax(dim=1, keepdim=True)
        variance = torch.where(rewarded, variance, torch.maximum(variance, rewarded_variance))
        return centered / ((variance + self.std_floor**2).sqrt() + _EPS)

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]`` bool: the scores of the completion's peers have a standard deviation above ``min_spread``."""
        if self.min_spread is None:
            return super().used(rewards)
        return rewards.peer_moments(self.scores(rewards))[2].sqrt() > self.min_spread
