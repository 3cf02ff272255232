"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from moslim.errors import UsageError
from moslim.policy.optimizers.base import GroupScores, LossParts, UpdateBatch
from moslim.policy.optimizers.policy_gradient import PolicyGradient

Ratio = Literal["sequence", "token"]


@dataclass(eq=False, kw_only=True)
class RLOO(PolicyGradient):
    """Each answer's advantage is its score less the mean score of the other answers to the same prompt.

    Rewarded answers are compared with rewarded ones only. The others, whose score is minus penalty and KL, are compared
    among themselves. An answer without another of its kind has advantage 0.

    The KL divergence is k1 in the reward, inside the baseline, as in TRL; OpenRLHF adds it per token after the
    baseline, which is another estimator. verl's ``n/(n-1) (score - group mean)`` is the same advantage.

    Args:
        ratio: ``token`` clips one ratio per token and, by the default ``reduction``, divides by the length limit, so
            that long answers neither gain nor lose (Dr. GRPO, arXiv 2503.20783); ``sequence`` clips one per answer and
            takes the mean over answers (TRL). On policy both have the same gradient up to that constant. An answer's
            ratio, and its importance weight, is the product of those of its tokens: ``sequence`` adds up the rounding
            of all of them, and is refused with ``top_p`` and ``top_k``.
    """

    ratio: Ratio = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("ratio", get_args(Ratio))
        if self.ratio == "sequence" and self.reduction != "constant":
            raise UsageError(
                f"policy_optimizer.reduction is '{self.reduction}', but ratio 'sequence' has no token losses to "
                "average: give ratio 'token'"
            )

    @property
    def weighs_answers(self) -> bool:
        """In the sequence form."""
        return self.ratio == "sequence"

    def advantages(self, rewards: GroupScores) -> Tensor:
        score = self.compares(self.scores_less_kl(rewards))
        count, mean, _ = rewards.peer_moments(score)
        return (score - mean) * count / (count - 1).clamp(min=1)  # score - (count * mean - score) / (count - 1)

    def loss(self, batch: UpdateBatch) -> LossParts:
        if self.ratio == "token":
            return super().loss(batch)
        objective, clipped = self.clipped(batch.log_ratio.sum(dim=1), batch.advantages)
        weights = batch.importance(batch.log_surplus.sum(dim=1))
        answers = len(batch.mask if batch.step_mask is None else batch.step_mask)
        surrogate = -(objective * weights).sum() / answers * batch.parts
        metrics = {"clip_fraction": clipped.mean(), **batch.importance_metrics(weights)}
        return self.regularized(surrogate, metrics, batch)

    def reduce(self, values: Tensor, batch: UpdateBatch) -> Tensor:
        """Averages per-token values; in the sequence form, sums them over each answer and averages over answers."""
        reduced = super().reduce(values, batch)
        return reduced * batch.length if self.ratio == "sequence" else reduced
