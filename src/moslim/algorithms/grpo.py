"""GRPO: group-normalised advantages, per-token clipping, KL in the loss (Shao et al. 2024, arXiv 2402.03300)."""

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
    """Each answer's advantage is its score's distance from its group's mean, in standard deviations.

    ``(score - mean_G) / (sqrt(var + std_floor^2) + 1e-4)`` with the Bessel-corrected variance; with ``std_floor: 0`` it
    is TRL's. verl adds 1e-6 and OpenRLHF 1e-9 instead of 1e-4; NeMo-RL takes leave-one-out moments.

    Answers to which no reward applies enter neither the mean nor the deviation. Their scores, minus penalty and KL, are
    compared with their own mean in the group, in units of the larger of both deviations.

    Args:
        loss_agg_mode: ``token_mean`` is DAPO's and TRL's default, ``grpo`` the paper's, ``constant`` Dr. GRPO's.
        scale: Whose standard deviation is divided by: the ``group``'s; that of all scores of the ``batch`` (with
            ``normalize_then_sum``, GDPO's last step, arXiv 2601.05242); or ``none`` (Dr. GRPO, arXiv 2503.20783).
        min_spread: Groups whose scores, before any KL, have a standard deviation of this or less are left out of
            updates (DAPO's dynamic sampling without resampling; a learned reward's spread is never exactly 0). None
            keeps them all.
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
        centred, rewarded = score - mean, rewards.rewarded
        if self.scale == "none":
            return centred
        if self.scale == "batch":
            others = moments(score, rewarded)[1]
            variance = torch.where(rewarded, others, moments(score, ~rewarded)[1])
        else:
            others = variance.masked_fill(~rewarded, 0.0).amax(dim=1, keepdim=True)
        variance = torch.where(rewarded, variance, torch.maximum(variance, others))
        return centred / ((variance + self.std_floor**2).sqrt() + _EPS)

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """Leaves out answers whose peers in the group are all about equally good, ``[G, n]`` bool."""
        if self.min_spread is None:
            return super().used(rewards)
        return rewards.peer_moments(self.scores(rewards))[2].sqrt() > self.min_spread
