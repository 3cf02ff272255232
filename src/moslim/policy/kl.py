"""Per-token estimates of KL(policy || reference) from sampled tokens (Schulman 2020), for reward or loss.

Where they may stand (arXiv 2510.01555, 2512.21852), with ``x = log p - log q``:

- ``k1`` in the reward is unbiased, in value and gradient. Nothing else is, there: ``E[k2]`` is not the divergence, and
  the score-function gradient of ``k3`` leaves out ``E[grad k3]``, which is zero for ``k1`` alone.
- In the loss, where the gradient goes through the estimate, ``k1`` has ``E[grad log p] = 0``: no gradient at all.
  ``k2`` has ``E[x grad log p]``, that of the divergence. ``k3`` alone is biased, but weighted with the probability
  ratio, through which the gradient goes too, it has that of the divergence as well. Off policy both need the ratio.

So this project puts ``k1`` in rewards, ``k2`` (weighted by the detached ratio) or ``k3`` (weighted by the ratio) in
losses, and refuses the rest. TRL's GRPO has ``k3`` without weight unless ``use_bias_correction_kl`` is set.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moslim.errors import UsageError

KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["reward", "loss"]
_LIMIT = 20.0
_REFUSED = {
    ("loss", "k1"): "k1 in the loss has an expected gradient of zero, so that nothing would hold the policy: "
    "give kl 'k2' or 'k3'",
    ("reward", "k2"): "k2 in the reward is no estimate of the divergence, only its square: give kl 'k1'",
    ("reward", "k3"): "k3 in the reward has a biased gradient, though its value is right: give kl 'k1'",
}


def check_kl(place: KLPlace, estimator: KLEstimator) -> None:
    """Refuses combinations that have no gradient, or a wrong one.

    Raises:
        UsageError: With the reason.
    """
    if place not in ("reward", "loss") or estimator not in ("k1", "k2", "k3"):
        raise UsageError(
            f"policy_optimizer.kl_in is '{place}', kl is '{estimator}': give kl_in 'reward' or 'loss', "
            "and kl 'k1' in the reward, 'k2' or 'k3' in the loss"
        )
    if (place, estimator) in _REFUSED:
        raise UsageError(f"policy_optimizer.kl_in is '{place}', kl is '{estimator}': {_REFUSED[place, estimator]}")


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


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """Ratio of probabilities from its log, which is clamped to +-20 against overflow; shape as given."""
    return log_ratio.clamp(-_LIMIT, _LIMIT).exp()


def kl_loss(estimator: KLEstimator, logprobs: Tensor, reference: Tensor, log_ratio: Tensor) -> Tensor:
    """A per-token loss whose gradient, under answers sampled by an earlier policy too, is that of the divergence.

    Args:
        estimator: ``k2`` or ``k3``.
        logprobs: ``[N, T]`` with gradient.
        reference: ``[N, T]``.
        log_ratio: ``[N, T]`` log of current over old probability.

    Raises:
        UsageError: The estimator has no place in a loss.
    """
    check_kl("loss", estimator)
    ratio = probability_ratio(log_ratio)
    if estimator == "k2":
        return ratio.detach() * k2(logprobs, reference)
    return ratio * k3(logprobs, reference)
