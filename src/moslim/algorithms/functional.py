"""Formulas that the algorithms share: KL estimates, returns, aggregation of losses and rewards.

Per-token estimates of KL(policy || reference) from sampled tokens (Schulman 2020), for reward or loss.

Where they may stand (arXiv 2510.01555, 2512.21852), with ``x = log p - log q``:

- ``k1`` in the reward is unbiased, in value and gradient. Nothing else is, there: ``E[k2]`` is not the divergence, and
  the score-function gradient of ``k3`` leaves out ``E[grad k3]``, which is zero for ``k1`` alone.
- In the loss, where the gradient goes through the estimate, ``k1`` has ``E[grad log p] = 0``: no gradient at all.
  ``k2`` has ``E[x grad log p]``, that of the divergence. ``k3`` alone is biased, but weighted with the probability
  ratio, through which the gradient goes too, it has that of the divergence as well. Off policy both need the ratio.

So this project puts ``k1`` in rewards, ``k2`` (weighted by the detached ratio) or ``k3`` (weighted by the ratio) in
losses, and refuses the rest. TRL's GRPO has ``k3`` without weight unless ``use_bias_correction_kl`` is set.

What changes the weight of the KL divergence during training; without one it stays as it is.

The critic: how much is still to come before each token of an answer, read from hidden states.

From rewards per token to what follows each token.

Several rewards per answer, one per dimension, made into one.

How per-token values become one number: averages whose gradient, averaged over processes, is that of all answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moslim.ops.chunked_linear import kept
from moslim.ops.loading import transformer_part
from moslim.ops.lora import LoraOptions
from moslim.ops.numerics import apply_wide
from moslim.plugin import Plugin
from moslim.training.distributed import mean_over_processes, process_count, shared_count
from moslim.utils.errors import UsageError

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


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x = log p - log q``: unbiased, signed."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x^2 / 2``."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``exp(-x) - 1 + x``: unbiased and never negative; ``x`` is clamped to +-20 against overflow."""
    x = (logprobs - ref_logprobs).clamp(-_LIMIT, _LIMIT)
    return (-x).exp() - 1 + x


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """Ratio of probabilities from its log, which is clamped to +-20 against overflow; shape as given."""
    return log_ratio.clamp(-_LIMIT, _LIMIT).exp()


def kl_loss(estimator: KLEstimator, logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """A per-token loss whose gradient, under answers sampled by an earlier policy too, is that of the divergence.

    Args:
        estimator: ``k2`` or ``k3``.
        logprobs: ``[N, T]`` with gradient.
        ref_logprobs: ``[N, T]``.
        log_ratio: ``[N, T]`` log of current over old probability.

    Raises:
        UsageError: The estimator has no place in a loss.
    """
    check_kl("loss", estimator)
    ratio = probability_ratio(log_ratio)
    if estimator == "k2":
        return ratio.detach() * k2(logprobs, ref_logprobs)
    return ratio * k3(logprobs, ref_logprobs)


class KLController(Plugin, ABC):
    """Multiplies ``kl_coef`` by a factor that follows the divergence. Its state goes into every checkpoint."""

    role: ClassVar[str] = "kl_controller"

    factor: float = 1.0
    """What ``kl_coef`` is multiplied by at present."""

    @abstractmethod
    def observe(self, sequence_kl: float) -> None:
        """Called once per training rollout: the place to change ``factor``.

        Args:
            sequence_kl: Mean over all processes' answers of KL(policy || reference), in nats per answer.
        """

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.factor = state_dict["factor"]


class AdaptiveKL(KLController):
    """Steers the divergence to a target by a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    ``error = clip((KL - target) / target, -0.2, 0.2)``, ``factor *= 1 + gain * error`` (arXiv 1909.08593). TRL and
    OpenRLHF write the gain as answers per rollout over a horizon.

    Args:
        target: Wanted divergence in nats per answer.
        gain: Step per rollout, the paper's ``K_beta``.
    """

    def __init__(self, target: float = 6.0, gain: float = 0.1) -> None:
        if target <= 0 or not 0 < gain < 5:
            raise UsageError(
                f"kl_controller: target is {target}, gain is {gain}: give a target above 0, a gain in (0, 5)"
            )
        self.target = target
        self.gain = gain

    def observe(self, sequence_kl: float) -> None:
        error = min(0.2, max(-0.2, (sequence_kl - self.target) / self.target))
        self.factor *= 1 + self.gain * error


CRITIC_RATE = 1e-5
"""A policy's usual rate of 1e-6 is too low for a head that starts at 0: verl and OpenRLHF have about this one, too."""


@dataclass
class CriticOptions:
    """What a policy optimizer asks the PolicyTrainer to build.

    Args:
        lora: Adapter of the critic's own on the policy's frozen base; None = a head on the policy's trunk.
        lr: Rate at which its head and adapter are trained; None = :data:`CRITIC_RATE`, or the policy's where that is
            higher.
    """

    lora: LoraOptions | None = None
    lr: float | None = None


class ValueHead(nn.Module):
    """A linear layer from hidden state to value; it starts at 0 everywhere.

    Args:
        hidden_size: ``H``.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values of states in which tokens were chosen: ``[M, H]`` to ``[M]``, float32 or finer."""
        return apply_wide(self.linear, states)[..., 0].clone()  # a view could lose the hooks of FSDP


class HiddenStateReader:
    """Reads hidden states of answers, without computing logits, for :class:`moslim.ops.logprobs.CompletionPass`.

    Args:
        model: Causal language model in the Hugging Face form, with or without adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """``[B, keep, H]`` at the last positions, or at those given; the arguments are the trunk's."""
        return kept(transformer_part(self.model)(**inputs).last_hidden_state, keep)


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


Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
_LEAST = 1e-4


def normalize_then_sum(per_dimension: Tensor, std_floor: float, weights: Tensor | None = None) -> Tensor:
    """Normalises every dimension within its group, then adds up (GDPO, arXiv 2601.05242, with a softened std).

    ``sum_d w_d (r_d - mean_G r_d) / sqrt(var_G r_d + std_floor^2) / sqrt(sum_d w_d^2)`` over the dimensions that are
    active for the answer; mean and variance (uncorrected) are those of the group's answers that have a value. The floor
    keeps a dimension that is already satisfied from being noise blown up to unit variance; without one, a deviation
    below 1e-4 is taken for rounding. The root keeps prompts that name many dimensions from counting more. GDPO's last
    step, dividing by the standard deviation of the whole batch, is GRPO's ``scale: batch`` and the whitening of
    REINFORCE++ and PPO.

    Args:
        per_dimension: ``[G, n, D]``, NaN where inactive.
        std_floor: In units of the reward.
        weights: ``[G, n, D]``, 0 or more; None = equal ones.

    Returns:
        ``[G, n]``; 0 where no dimension is active.

    Raises:
        UsageError: There is one answer per prompt, which is no group to normalise in.
    """
    if per_dimension.shape[1] < 2:
        raise UsageError(
            "aggregation normalize_then_sum compares the answers to a prompt: set num_generations to 2 or more, "
            "or aggregation to sum_then_normalize"
        )
    active = (~per_dimension.isnan()).to(per_dimension.dtype)
    values = per_dimension.masked_fill(per_dimension.isnan(), 0.0)
    count = active.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(dim=1, keepdim=True) / count) * active
    scale = (centred.square().sum(dim=1, keepdim=True) / count + std_floor**2).sqrt().clamp(min=_LEAST)
    weight = active if weights is None else active * weights
    total = (centred / scale * weight).sum(dim=-1)
    return total / weight.square().sum(dim=-1).sqrt().clamp(min=1e-8)


LossAggMode = Literal["grpo", "token_mean", "constant"]


def reduce_tokens(
    values: Tensor,
    mask: Tensor,
    loss_agg_mode: LossAggMode,
    max_completion_length: int,
    step_mask: Tensor | None = None,
    parts: float = 1,
) -> Tensor:
    """Averages per-token values to a scalar.

    Answers with an empty mask do not count.

    Args:
        values: ``[N, T]``.
        mask: ``[N, T]`` bool.
        loss_agg_mode: ``grpo`` is the mean over answers of the mean over tokens (arXiv 2402.03300), ``token_mean`` the
            mean over all tokens (DAPO, arXiv 2503.14476), ``constant`` the sum over tokens divided by the length limit,
            then the mean over answers (Dr. GRPO, arXiv 2503.20783). All over all processes.
        max_completion_length: The engine's length limit.
        step_mask: ``[M, T]`` bool, the masks of all minibatches whose gradients make one step, this one's among them:
            the mean of their results, which Lightning takes, is then that over all they hold. None = this one alone.
        parts: How many results that mean is taken of; the last step of an epoch may have fewer than it.
    """
    counted = mask if step_mask is None else step_mask
    if loss_agg_mode == "token_mean":
        return (values * mask).sum() / shared_count(counted) * parts
    answers = shared_count(counted.any(dim=1)) / parts
    if loss_agg_mode == "constant":
        return (values * mask).sum() / (answers * max_completion_length)
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
