"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from moslim.policy.optimizers.base import Aggregation, GroupScores, LossParts, PolicyOptimizer

Ratio = Literal["sequence", "token"]


class RLOO(PolicyOptimizer):
    """Each answer's advantage is its score less the mean score of the other answers to the same prompt.

    The KL divergence is k1 in the reward, inside the baseline, as in TRL; OpenRLHF adds it per token after the
    baseline, which is another estimator.

    Args:
        kl_coef: Weight of the summed k1 estimates in the score.
        ratio: ``sequence`` clips one ratio per answer and takes the mean over answers (TRL); ``token`` clips one per
            token and divides by the length limit, so that long answers neither gain nor lose (Dr. GRPO,
            arXiv 2503.20783). On policy both have the same gradient up to that constant.
        clip_low: See PolicyOptimizer.
        clip_high: See PolicyOptimizer.
        aggregation: See PolicyOptimizer.
        std_floor: See PolicyOptimizer.
    """

    kl_in_reward: ClassVar[bool] = True

    def __init__(
        self,
        kl_coef: float = 0.05,
        ratio: Ratio = "sequence",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Aggregation = "sum_then_normalize",
        std_floor: float = 0.1,
    ) -> None:
        super().__init__(kl_coef, clip_low, clip_high, aggregation, std_floor)
        if ratio not in ("sequence", "token"):
            raise ValueError(f"policy_optimizer.ratio is '{ratio}': give 'sequence' or 'token'")
        self.ratio = ratio

    def advantages(self, rewards: GroupScores) -> Tensor:
        score = self.scores(rewards)
        samples = score.shape[1]
        if samples < 2:
            raise ValueError("RLOO compares the answers to a prompt: set samples_per_prompt to 2 or more")
        others = (score.sum(dim=1, keepdim=True) - score) / (samples - 1)
        return score - others

    def loss(
        self, logprobs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor, length: int
    ) -> LossParts:
        log_ratio = (logprobs - old) * mask
        if self.ratio == "sequence":
            objective, clipped = self.clipped(log_ratio.sum(dim=1), advantages)
            return LossParts(-objective.mean(), {"clip_fraction": clipped.mean()})
        objective, clipped = self.clipped(log_ratio, advantages[:, None])
        loss = -(objective * mask).sum() / (len(mask) * length)
        return LossParts(loss, {"clip_fraction": (clipped * mask).sum() / mask.sum().clamp(min=1)})
