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
    """REINFORCE leave-one-out: the baseline of a completion is the mean score of the prompt's other completions.

    With scores ``s``, which include the KL penalty ``-beta * sum_t k1`` as in TRL, the advantage is
    ``A_i = s_i - mean_{j != i} s_j`` (arXiv 2402.14740), the same as verl's ``n / (n - 1) (s_i - mean(s))``.
    OpenRLHF subtracts the KL per token after the baseline. The loss is the clipped surrogate of
    :class:`PolicyGradient`.

    Rewarded completions are compared with rewarded ones, neutral ones with neutral ones; a completion without another
    of its kind has advantage 0.

    Args:
        importance_sampling_level: ``token`` clips one ratio per token; with the default ``loss_agg_mode: constant``
            the weight of a token does not depend on the length of its completion (Dr. GRPO, arXiv 2503.20783).
            ``sequence`` clips one ratio per completion, the product over its tokens, and takes the mean over
            completions (TRL). On policy the two gradients differ by a constant factor. ``sequence`` accumulates the
            rounding of all tokens, and is refused with ``top_p`` and ``top_k``.
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
        """Whether ratio, clip and importance weight apply to whole completions instead of tokens."""
        return self.importance_sampling_level == "sequence"

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]``: score minus mean score of the other peers, ``score - (count * mean - score) / (count - 1)``."""
        score = self.compares(self.scores_less_kl(rewards))
        count, mean, _ = rewards.peer_moments(score)
        return (score - mean) * count / (count - 1).clamp(min=1)

    def loss(self, batch: LossInputs) -> LossOutput:
        if self.importance_sampling_level == "token":
            return super().loss(batch)
        objective, clipped = self.clipped(batch.log_ratio.sum(dim=1), batch.advantages)
        weights = batch.importance(batch.log_importance_weight.sum(dim=1))
        completions = len(batch.mask if batch.step_mask is None else batch.step_mask)
        surrogate = -(objective * weights).sum() / completions * batch.loss_scale
        metrics = {"clip_fraction": clipped.mean(), **batch.importance_metrics(weights)}
        return self.regularized(surrogate, metrics, batch)

    def reduce(self, values: Tensor, batch: LossInputs) -> Tensor:
        """Reduces per-token values ``[N, T]``; with ``sequence``, sums over tokens, then the mean over completions."""
        reduced = super().reduce(values, batch)
        return reduced * batch.max_completion_length if self.importance_sampling_level == "sequence" else reduced
