"""From rewards per token to what follows each token."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """``s_t = x_t + factor * s_{t+1}`` along the last axis."""
    total = torch.zeros_like(values[..., 0])
    sums = []
    for step in values.unbind(dim=-1)[::-1]:
        total = step + factor * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=-1)


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16): the discounted sum of one-step surprises.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}``. After an answer's last token
    nothing follows, also where it was cut at the length limit.

    Args:
        rewards: ``[.., T]``, 0 where masked.
        values: ``[.., T]``, before each token.
        mask: ``[.., T]`` bool, padding on the right.
        gamma: Discount per token.
        lam: 1 trusts the rewards, 0 the values.

    Returns:
        ``[.., T]``, 0 where masked.
    """
    values = values * mask
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    return discounted_sums(rewards + gamma * following - values, gamma * lam) * mask
