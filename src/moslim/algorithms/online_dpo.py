"""Online DPO: a preference loss on the policy's own answers (Guo et al. 2024, arXiv 2402.04792)."""

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
    """The best answer to each prompt is chosen over the worst; only the order of the scores matters.

    With ``h`` the answer's summed ``log p - log q`` to the reference and ``m = h_best - h_worst``, the loss is
    ``-log sigmoid(beta m)`` (DPO, arXiv 2305.18290, eq. 7) or ``(m - 1 / (2 beta))^2`` (IPO, arXiv 2310.12036, eq. 17,
    with sums as in TRL's Online DPO). TRL samples two answers and lets the first win ties; here the best and the worst
    of all samples make the pair, the others cost nothing, and ties are dropped. Answers to which no reward applies make
    a pair with each other only, by their penalties, and only where fewer than two of the group are rewarded.

    Args:
        beta: Strength of the pull to the reference.
        loss_type: ``sigmoid`` or ``ipo``.
        min_margin: Pairs whose scores differ by this or less are dropped, in units of the score.
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
        """``[G, n]``: 1 for the answer that is chosen, -1 for the one that is rejected, 0 for the others."""
        score = self.compares(self.scores(rewards))
        rewarded = rewards.rewarded
        among = torch.where(rewarded.sum(dim=1, keepdim=True) > 1, rewarded, ~rewarded)
        above, below = score.masked_fill(~among, -torch.inf), score.masked_fill(~among, torch.inf)
        best, worst = above.argmax(dim=1), below.argmin(dim=1)
        gap = (above.amax(dim=1) - below.amin(dim=1))[:, None]
        sign = one_hot(best, score.shape[1]) - one_hot(worst, score.shape[1])
        return (sign * (gap > self.min_margin)).to(score.dtype)

    def used(self, rewards: AdvantageInputs) -> Tensor:
        """The pairs, ``[G, n]`` bool."""
        return self.advantages(rewards) != 0

    def loss(self, batch: LossInputs) -> LossOutput:
        if batch.ref_logprobs is None:
            raise UsageError("OnlineDPO needs the reference's log-probabilities in the batch")
        log_odds = ((batch.logprobs - batch.ref_logprobs) * batch.mask).sum(dim=1)
        margin = (log_odds * batch.advantages).reshape(-1, batch.num_generations).sum(dim=1)  # one per prompt
        pair = _pairs(batch.mask, batch.num_generations)
        counted = pair if batch.step_mask is None else _pairs(batch.step_mask, batch.num_generations)
        if self.loss_type == "sigmoid":
            losses = -logsigmoid(self.beta * margin)
        else:
            losses = (margin - 1 / (2 * self.beta)).square()
        loss = (losses * pair).sum() / shared_count(counted) * batch.parts
        won = margin.detach()[pair]
        metrics = {"pairs": pair.float().mean()}
        if len(won):
            metrics |= {"accuracy": (won > 0).float().mean(), "margin": self.beta * won.mean()}
        return LossOutput(loss, metrics)


def _pairs(mask: Tensor, num_generations: int) -> Tensor:
    """Which prompts have a pair, ``[G]`` bool."""
    return mask.any(dim=1).reshape(-1, num_generations).any(dim=1)
