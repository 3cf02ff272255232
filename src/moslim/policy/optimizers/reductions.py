"""How per-token values become one number: averages whose gradient, averaged over processes, is that of all answers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moslim.processes import mean_over_processes, process_count, shared_count

Reduction = Literal["grpo", "token_mean", "constant"]


def reduce_tokens(
    values: Tensor, mask: Tensor, reduction: Reduction, length: int, step_mask: Tensor | None = None, parts: float = 1
) -> Tensor:
    """Averages per-token values to a scalar.

    Answers with an empty mask do not count.

    Args:
        values: ``[N, T]``.
        mask: ``[N, T]`` bool.
        reduction: ``grpo`` is the mean over answers of the mean over tokens (arXiv 2402.03300), ``token_mean`` the mean
            over all tokens (DAPO, arXiv 2503.14476), ``constant`` the sum over tokens divided by the length limit,
            then the mean over answers (Dr. GRPO, arXiv 2503.20783). All over all processes.
        length: The engine's length limit.
        step_mask: ``[M, T]`` bool, the masks of all minibatches whose gradients make one step, this one's among them:
            the mean of their results, which Lightning takes, is then that over all they hold. None = this one alone.
        parts: How many results that mean is taken of; the last step of an epoch may have fewer than it.
    """
    counted = mask if step_mask is None else step_mask
    if reduction == "token_mean":
        return (values * mask).sum() / shared_count(counted) * parts
    answers = shared_count(counted.any(dim=1)) / parts
    if reduction == "constant":
        return (values * mask).sum() / (answers * length)
    return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / answers


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Bessel-corrected variance of the unmasked values of all processes."""
    count = shared_count(mask)
    mean = mean_over_processes((values * mask).sum()) / count
    variance = mean_over_processes(((values - mean).square() * mask).sum()) / count
    total = count * process_count()
    return mean, variance * total / (total - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, std_floor: float = 0.0, rewarded: Tensor | None = None) -> Tensor:
    """Shifts and scales to mean 0 and variance 1 over all processes' unmasked values; 0 where masked.

    ``(x - mean) / sqrt(var + std_floor^2 + 1e-8)`` with the Bessel-corrected variance, as TRL and verl have it;
    OpenRLHF's is not corrected. Values to which no reward applies are left out of both moments. They are shifted by
    their own mean, and scaled by the larger of both variances, so that they keep the unit of the others.

    Args:
        values: Any shape.
        mask: The same shape, bool.
        std_floor: In units of the values.
        rewarded: Bool, a shape that broadcasts to it; None = all are.
    """
    rewarded = torch.ones_like(mask) if rewarded is None else rewarded.expand_as(mask)
    mean, variance = moments(values, mask & rewarded)
    own_mean, own_variance = moments(values, mask & ~rewarded)
    variance = torch.where(rewarded, variance, torch.maximum(variance, own_variance))
    return (values - torch.where(rewarded, mean, own_mean)) * torch.rsqrt(variance + std_floor**2 + 1e-8) * mask
