"""Per-token estimates of KL(policy || reference) from sampled tokens (Schulman 2020), for reward or loss.

Where they may stand (arXiv 2510.01555, 2512.21852): ``k1`` in the reward is unbiased. As a loss term ``k1`` has zero
expected gradient, ``k2`` has, on policy, the gradient of ``k1`` in the reward, and ``k3`` approximates it to first
order. So this project puts ``k1`` in rewards and ``k2`` or ``k3`` in losses, and refuses the rest.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLInLoss = Literal["k2", "k3"]
_LIMIT = 20.0


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``x = log p - log q``: unbiased, signed."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``x^2 / 2``."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``exp(-x) - 1 + x``: unbiased and never negative; ``x`` is clamped to +-20 against overflow."""
    x = (logprobs - reference).clamp(-_LIMIT, _LIMIT)
    return (-x).exp() - 1 + x


def kl_loss(kind: KLInLoss, logprobs: Tensor, reference: Tensor) -> Tensor:
    """The estimator ``kind`` for use in a loss.

    Raises:
        ValueError: ``kind`` has no useful gradient as a loss.
    """
    if kind == "k2":
        return k2(logprobs, reference)
    if kind == "k3":
        return k3(logprobs, reference)
    raise ValueError(f"KL estimator '{kind}' in the loss: use 'k2' or 'k3' (k1 has zero expected gradient there)")
