"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, LossInputs, LossOutput, PolicyGradient
from moslim.utils.errors import UsageError

ImportanceSamplingLevel = Literal["sequence", "token"]


@dataclass(eq=False, kw_only=True)
class RLOO(PolicyGradient):
    """Each answer's advantage is its score less the mean score of the other answers to the same prompt.

    Rewarded answers are compared with rewarded ones only. The others, whose score is minus penalty and KL, are compared
    among themselves. An answer without another of its kind has advantage 0.

    The KL divergence is k1 in the reward, inside the baseline, as in TRL; OpenRLHF adds it per token after the
    baseline, which is another estimator. verl's ``n/(n-1) (score - group mean)`` is the same advantage.

    Args:
        importance_sampling_level: ``token`` clips one ratio per token and, by the default ``loss_agg_mode``,
            divides by the length limit, so that long answers neither gain nor lose (Dr. GRPO, arXiv 2503.20783);
            ``sequence`` clips one per answer and
            takes the mean over answers (TRL). On policy both have the same gradient up to that constant. An answer's
            ratio, and its importance weight, is the product of those of its tokens: ``sequence`` adds up the rounding
            of all of them, and is refused with ``top_p`` and ``top_k``.
    """

    importance_sampling_level: ImportanceSamplingLevel = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("importance_sampling_level", get_args(ImportanceSamplingLevel))
        if self.importance_sampling_level == "sequence" and self.loss_agg_mode != "constant":
            raise UsageError(
                f"policy_optimizer.loss_agg_mode is '{self.loss_agg_mode}', but importance_sampling_level "
                "'sequence' has no token losses to average: give importance_sampling_level 'token'"
            )

    @property
    def weighs_completions(self) -> bool:
        """In the sequence form."""
        return self.importance_sampling_level == "sequence"

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        score = self.compares(self.scores_less_kl(rewards))
        count, mean, _ = rewards.peer_moments(score)
        return (score - mean) * count / (count - 1).clamp(min=1)  # score - (count * mean - score) / (count - 1)

    def loss(self, batch: LossInputs) -> LossOutput:
        if self.importance_sampling_level == "token":
            return super().loss(batch)
        objective, clipped = self.clipped(batch.log_ratio.sum(dim=1), batch.advantages)
        weights = batch.importance(batch.log_importance_weight.sum(dim=1))
        answers = len(batch.mask if batch.step_mask is None else batch.step_mask)
        surrogate = -(objective * weights).sum() / answers * batch.parts
        metrics = {"clip_fraction": clipped.mean(), **batch.importance_metrics(weights)}
        return self.regularized(surrogate, metrics, batch)

    def reduce(self, values: Tensor, batch: LossInputs) -> Tensor:
        """Averages per-token values; in the sequence form, sums them over each answer and averages over answers."""
        reduced = super().reduce(values, batch)
        return reduced * batch.max_completion_length if self.importance_sampling_level == "sequence" else reduced
