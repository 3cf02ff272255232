"""GRPO: group-normalised advantages, per-token clipping, KL in the loss (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from moslim.policy.kl import KLInLoss, kl_loss
from moslim.policy.optimizers.base import Aggregation, GroupScores, LossParts, PolicyOptimizer
from moslim.processes import mean_over_processes

Reduction = Literal["grpo", "token_mean", "constant"]


def reduce_tokens(values: Tensor, mask: Tensor, reduction: Reduction, length: int) -> Tensor:
    """Averages per-token values ``[N, T]`` to a scalar; its gradient, averaged over processes, is that of all answers.

    Args:
        values: ``[N, T]``.
        mask: ``[N, T]`` bool.
        reduction: ``grpo`` is the mean over answers of the mean over tokens, ``token_mean`` the mean over all tokens
            (DAPO, arXiv 2503.14476), ``constant`` the sum over tokens divided by the length limit, then the mean
            over answers (Dr. GRPO, arXiv 2503.20783).
        length: The engine's length limit.
    """
    sums = (values * mask).sum(dim=1)
    if reduction == "grpo":
        return (sums / mask.sum(dim=1).clamp(min=1)).mean()
    if reduction == "token_mean":
        return sums.sum() / mean_over_processes(mask.sum()).clamp(min=1)
    return (sums / length).mean()


class GRPO(PolicyOptimizer):
    """Each answer's advantage is its score's distance from its group's mean, in group standard deviations.

    Args:
        kl_coef: Weight of the KL divergence in the loss.
        kl: Its estimator, ``k2`` or ``k3``. ``k3`` is weighted by the probability ratio, which makes its gradient
            right off policy too.
        reduction: How token losses are averaged, see :func:`reduce_tokens`.
        scale: Divide by the group's standard deviation (Bessel-corrected); off is Dr. GRPO's choice.
        clip_low: See PolicyOptimizer.
        clip_high: See PolicyOptimizer; above ``clip_low`` is DAPO's clip-higher.
        aggregation: See PolicyOptimizer.
        std_floor: See PolicyOptimizer.
    """

    kl_in_reward: ClassVar[bool] = False
    _EPS = 1e-4

    def __init__(
        self,
        kl_coef: float = 0.05,
        kl: KLInLoss = "k3",
        reduction: Reduction = "token_mean",
        scale: bool = True,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Aggregation = "sum_then_normalize",
        std_floor: float = 0.1,
    ) -> None:
        super().__init__(kl_coef, clip_low, clip_high, aggregation, std_floor)
        if kl not in ("k2", "k3"):
            raise ValueError(f"policy_optimizer.kl is '{kl}': use 'k2' or 'k3' (k1 has no gradient on average)")
        if reduction not in ("grpo", "token_mean", "constant"):
            raise ValueError(f"policy_optimizer.reduction is '{reduction}': use 'grpo', 'token_mean' or 'constant'")
        self.kl = kl
        self.reduction = reduction
        self.scale = scale

    def advantages(self, rewards: GroupScores) -> Tensor:
        score = self.scores(rewards)
        if score.shape[1] < 2:
            raise ValueError("GRPO compares the answers to a prompt: set samples_per_prompt to 2 or more")
        centred = score - score.mean(dim=1, keepdim=True)
        return centred / (score.std(dim=1, keepdim=True) + self._EPS) if self.scale else centred

    def loss(
        self, logprobs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor, length: int
    ) -> LossParts:
        log_ratio = (logprobs - old) * mask
        objective, clipped = self.clipped(log_ratio, advantages[:, None])
        loss = reduce_tokens(-objective, mask, self.reduction, length)
        metrics = {"clip_fraction": (clipped * mask).sum() / mask.sum().clamp(min=1)}
        if reference is not None and self.kl_coef > 0:
            estimate = kl_loss(self.kl, logprobs, reference)
            if self.kl == "k3":
                estimate = estimate * log_ratio.clamp(-20, 20).exp()
            kl = reduce_tokens(estimate, mask, self.reduction, length)
            loss = loss + self.kl_coef * kl
            metrics["kl_loss"] = kl.detach()
        return LossParts(loss, metrics)
