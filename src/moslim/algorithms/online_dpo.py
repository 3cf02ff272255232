"""Online DPO: a preference loss on completions of the policy (Guo et al. 2024, arXiv 2402.04792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from moslim.algorithms.base import AdvantageInputs, LossInputs, LossOutput, PolicyOptimizer
from moslim.training.distributed import shared_count
from moslim.utils.errors import UsageError

LossType = Literal["sigmoid", "ipo"]


@dataclass(eq=False, kw_only=True)
class OnlineDPO(PolicyOptimizer):
    """DPO on the policy's own completions: the best completion of each prompt is chosen, the worst is rejected.

    With ``h = sum_t (logprobs - ref_logprobs)`` and ``m = h_chosen - h_rejected``, the loss per comparison is
    ``-log sigmoid(beta m)`` (DPO, arXiv 2305.18290, eq. 7) or ``(m - 1 / (2 beta))^2`` (IPO, arXiv 2310.12036, eq. 17,
    with sums over tokens as in TRL). Only the order of the scores matters; the other completions are skipped, and ties
    are dropped. TRL generates two completions and chooses the first one of a tie.

    Completions to which no reward applies are compared with each other only, by their penalties, and only where fewer
    than two completions of the prompt are rewarded.

    Args:
        beta: Weight of the implicit KL penalty to the reference.
        loss_type: ``sigmoid`` or ``ipo``.
        min_margin: Comparisons whose score margin is this or less are dropped, in units of the score.
    """

    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("loss_type", get_args(LossType))
        self.above("beta", 0)
        self.at_least("min_margin", 0)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities must be computed."""
        return True

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]``: 1 for the chosen completion of a prompt, -1 for the rejected one, 0 for the others."""
        score = self.compares(self.scores(rewards))
        rewarded = rewards.rewarded
        eligible = torch.where(rewarded.sum(dim=1, keepdim=True) > 1, rewarded, ~rewarded)
        highest, chosen = score.masked_fill(~eligible, -torch.inf).max(dim=1)
        lowest, rejected = score.masked_fill(~eligible, torch.inf).min(dim=1)
        sign = one_hot(chosen, score.shape[1]) - one_hot(rejected, score.shape[1])
        score_margin = (highest - lowest)[:, None]
        return (sign * (score_margin > self.min_margin)).to(score.dtype)

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """``[G, n]`` bool: the completion is chosen or rejected."""
        return self.advantages(rewards) != 0

    def loss(self, batch: LossInputs) -> LossOutput:
        if batch.ref_logprobs is None:
            raise UsageError("OnlineDPO needs the reference's log-probabilities in the batch")
        log_odds = ((batch.logprobs - batch.ref_logprobs) * batch.mask).sum(dim=1)
        margin = (log_odds * batch.advantages).reshape(-1, batch.num_generations).sum(dim=1)  # [G]
        compared_prompts = _comparison_mask(batch.mask, batch.num_generations)
        step_prompts = compared_prompts
        if batch.step_mask is not None:
            step_prompts = _comparison_mask(batch.step_mask, batch.num_generations)
        if self.loss_type == "sigmoid":
            losses = -logsigmoid(self.beta * margin)
        else:
            losses = (margin - 1 / (2 * self.beta)).square()
        loss = (losses * compared_prompts).sum() / shared_count(step_prompts) * batch.loss_scale
        margins = margin.detach()[compared_prompts]
        metrics = {"pairs": compared_prompts.float().mean()}
        if len(margins):
            metrics |= {"accuracy": (margins > 0).float().mean(), "margin": self.beta * margins.mean()}
        return LossOutput(loss, metrics)


def _comparison_mask(mask: Tensor, num_generations: int) -> Tensor:
    """``[G]`` bool: the prompt has a chosen and a rejected completion; from the token mask ``[N, T]``."""
    return mask.any(dim=1).reshape(-1, num_generations).any(dim=1)
