"""Formulas that the algorithms share: KL estimates and controllers, the value head, returns, reward aggregation, loss
reduction and whitening.

KL estimates. For sampled tokens and ``x = log p - log q``, policy ``p``, reference ``q`` (Schulman 2020, "Approximating
KL divergence"): ``k1 = x``, ``k2 = x^2 / 2``, ``k3 = exp(-x) - 1 + x``. Their use (arXiv 2510.01555, 2512.21852):

- In the reward, only ``k1`` is unbiased in value and gradient. ``E[k2]`` is not the divergence, and the score-function
  gradient of ``k3`` omits ``E[grad k3]``, which is zero for ``k1`` only.
- In the loss, the gradient of ``k1`` is ``E[grad log p] = 0``. The gradient of ``k2`` is ``E[x grad log p]``, that of
  the divergence. ``k3`` is biased, but ``k3`` times the probability ratio, with gradient through both, has the gradient
  of the divergence. Off policy, ``k2`` and ``k3`` both need the ratio.

Hence ``k1`` is allowed in the reward, and ``k2`` (times the detached ratio) and ``k3`` (times the ratio) in the loss.
TRL's GRPO uses ``k3`` without the ratio unless ``use_bias_correction_kl`` is set.

All means and moments are over the completions of all processes.
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
    """Refuses a place and an estimator whose combination has no gradient or a biased one.

    Raises:
        UsageError: The combination is refused, or a word is unknown.
    """
    if place not in ("reward", "loss") or estimator not in ("k1", "k2", "k3"):
        raise UsageError(
            f"policy_optimizer.kl_in is '{place}', kl is '{estimator}': give kl_in 'reward' or 'loss', "
            "and kl 'k1' in the reward, 'k2' or 'k3' in the loss"
        )
    if (place, estimator) in _REFUSED:
        raise UsageError(f"policy_optimizer.kl_in is '{place}', kl is '{estimator}': {_REFUSED[place, estimator]}")


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``k1 = x = log p - log q``: unbiased, may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``k2 = x^2 / 2``: biased, low variance, never negative."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``k3 = exp(-x) - 1 + x``: unbiased, never negative; ``x`` is clamped to +-20 against overflow."""
    x = (logprobs - ref_logprobs).clamp(-_LIMIT, _LIMIT)
    return (-x).exp() - 1 + x


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, with the log clamped to +-20 against overflow; same shape."""
    return log_ratio.clamp(-_LIMIT, _LIMIT).exp()


def kl_loss(estimator: KLEstimator, logprobs: Tensor, ref_logprobs: Tensor, log_ratio: Tensor) -> Tensor:
    """Per-token KL loss ``[N, T]`` with the gradient of KL(policy || reference), on and off policy.

    ``k2`` times the detached probability ratio, or ``k3`` times the ratio with gradient.

    Args:
        estimator: ``k2`` or ``k3``.
        logprobs: ``[N, T]`` log-probabilities under the current weights, with gradient.
        ref_logprobs: ``[N, T]`` log-probabilities under the reference.
        log_ratio: ``[N, T]`` ``logprobs - old_logprobs``, with gradient.

    Raises:
        UsageError: The estimator is ``k1``, which has no gradient in a loss.
    """
    check_kl("loss", estimator)
    ratio = probability_ratio(log_ratio)
    if estimator == "k2":
        return ratio.detach() * k2(logprobs, ref_logprobs)
    return ratio * k3(logprobs, ref_logprobs)


class KLController(Plugin, ABC):
    """Controller of the KL weight: ``kl_coef`` is multiplied by ``factor``. Its state goes into every checkpoint."""

    role: ClassVar[str] = "kl_controller"

    factor: float = 1.0
    """Current multiplier of ``kl_coef``."""

    @abstractmethod
    def observe(self, sequence_kl: float) -> None:
        """Updates ``factor``. Called once per training rollout.

        Args:
            sequence_kl: Mean of KL(policy || reference) over the completions of all processes, in nats per completion.
        """

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.factor = state_dict["factor"]


class AdaptiveKL(KLController):
    """Log-space proportional controller that keeps the KL near a target (Ziegler et al. 2019, arXiv 1909.08593, 2.2).

    ``error = clip((KL - target) / target, -0.2, 0.2)``, ``factor *= 1 + gain * error``. TRL and OpenRLHF give the gain
    as completions per rollout divided by a horizon.

    Args:
        target: Target of the KL in nats per completion.
        gain: Step per rollout, ``K_beta`` in the paper.

    Raises:
        UsageError: An option is out of range.
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
"""Default learning rate of the critic. A policy's usual 1e-6 is too low for a head that starts at 0; verl and OpenRLHF
have similar defaults."""


@dataclass
class CriticOptions:
    """Options of the critic that the PolicyTrainer builds.

    Args:
        lora: Low-rank adapter of the critic on the frozen base of the policy; None = a head on the policy's hidden
            states.
        lr: Learning rate of the critic's head and adapter; None = :data:`CRITIC_RATE`, or the policy's rate if that is
            higher.
    """

    lora: LoraOptions | None = None
    lr: float | None = None


class ValueHead(nn.Module):
    """Linear value head of the critic, initialised to 0.

    Args:
        hidden_size: Width ``H`` of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values ``[M]``, float32 or finer, of the hidden states ``[M, H]`` from which tokens were sampled."""
        return apply_wide(self.linear, states)[..., 0].clone()  # a view could lose the hooks of FSDP


class HiddenStateReader:
    """Reads hidden states of answers, without computing logits, for :class:`moslim.ops.logprobs.CompletionPass`.

    Args:
        model: Causal language model in the Hugging Face form, with or without adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """Hidden states ``[B, keep, H]`` at the last ``keep`` positions, or at the given ones.

        Args:
            keep: Number of last positions, or positions.
            inputs: Arguments of the transformer's forward pass.
        """
        return kept(transformer_part(self.model)(**inputs).last_hidden_state, keep)


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """Reverse discounted sums ``s_t = x_t + factor * s_{t+1}`` along the last axis; same shape."""
    total = torch.zeros_like(values[..., 0])
    sums = []
    for value in values.unbind(dim=-1)[::-1]:
        total = value + factor * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=-1)


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``. The value after the last token of a
    completion is 0, also if the completion was truncated at the length limit.

    Args:
        rewards: ``[..., T]`` token rewards, 0 where masked.
        values: ``[..., T]`` values before each token.
        mask: ``[..., T]`` bool, padding on the right.
        gamma: Discount per token.
        lam: GAE's lambda: 1 relies on the rewards only, 0 on the values.

    Returns:
        Advantages ``[..., T]``, 0 where masked.
    """
    values = values * mask
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    return discounted_sums(rewards + gamma * next_values - values, gamma * lam) * mask


Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
_LEAST = 1e-4


def normalize_then_sum(per_dimension: Tensor, std_floor: float, weights: Tensor | None = None) -> Tensor:
    """Normalises each dimension within its group, then adds up (GDPO, arXiv 2601.05242, with a floor of the std).

    ``sum_d w_d (r_d - mean_G r_d) / sqrt(var_G r_d + std_floor^2) / sqrt(sum_d w_d^2)`` over the active dimensions of
    the completion. Mean and (uncorrected) variance are over the group's completions in which the dimension is active.

    The floor keeps a satisfied dimension from being amplified to unit variance; the deviation is at least 1e-4 in any
    case. The last root keeps prompts that name many dimensions from having larger advantages. GDPO's division by the
    standard deviation of the batch is ``scale: batch`` of GRPO, and the whitening of REINFORCE++ and PPO.

    Args:
        per_dimension: ``[G, n, D]`` rewards, NaN where inactive.
        std_floor: Floor of the standard deviation, in units of the reward.
        weights: ``[G, n, D]`` non-negative weights; None = equal weights.

    Returns:
        Scores ``[G, n]``; 0 where no dimension is active.

    Raises:
        UsageError: There is one completion per prompt, so no group to normalise in.
    """
    if per_dimension.shape[1] < 2:
        raise UsageError(
            "aggregation normalize_then_sum compares the completions of a prompt: set num_generations to 2 or more, "
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
    loss_scale: float = 1,
) -> Tensor:
    """Reduces per-token values to a scalar: the share of this minibatch in a mean over one optimizer step.

    - ``grpo``: mean over completions of the mean over tokens (GRPO, arXiv 2402.03300).
    - ``token_mean``: mean over all tokens (DAPO, arXiv 2503.14476).
    - ``constant``: sum over tokens divided by ``max_completion_length``, then mean over completions (Dr. GRPO,
      arXiv 2503.20783).

    Means are over all minibatches of the step and all processes. Completions without unmasked tokens do not count.

    Args:
        values: ``[N, T]`` values of this minibatch.
        mask: ``[N, T]`` bool.
        loss_agg_mode: ``grpo``, ``token_mean`` or ``constant``.
        max_completion_length: Length limit of completions in tokens.
        step_mask: ``[M, T]`` bool, the concatenated masks of all minibatches that make one optimizer step, this one
            included; None = ``mask``.
        loss_scale: Factor of the result. It undoes the mean over accumulated batches that Lightning takes.
    """
    counted = mask if step_mask is None else step_mask
    if loss_agg_mode == "token_mean":
        return (values * mask).sum() / shared_count(counted) * loss_scale
    completions = shared_count(counted.any(dim=1)) / loss_scale
    if loss_agg_mode == "constant":
        return (values * mask).sum() / (completions * max_completion_length)
    return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / completions


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Bessel-corrected variance of the unmasked values of all processes; two scalars."""
    count = shared_count(mask)
    mean = mean_over_processes((values * mask).sum()) / count
    variance = mean_over_processes(((values - mean).square() * mask).sum()) / count
    total = count * process_count()
    return mean, variance * total / (total - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, std_floor: float = 0.0, rewarded: Tensor | None = None) -> Tensor:
    """Shifts and scales values to mean 0 and variance 1 over all processes; 0 where masked.

    ``(x - mean) / sqrt(var + std_floor^2 + 1e-8)`` with the Bessel-corrected variance, as in TRL and verl; OpenRLHF
    does not correct it. Values to which no reward applies do not enter these moments: they are shifted by their own
    mean and scaled by the larger of both variances, so that they keep the scale of the others.

    Args:
        values: Values of any shape.
        mask: Bool mask of the same shape.
        std_floor: Floor of the standard deviation, in units of the values.
        rewarded: Bool of a shape that broadcasts to ``values``: a reward applies; None = everywhere.
    """
    rewarded = torch.ones_like(mask) if rewarded is None else rewarded.expand_as(mask)
    mean, variance = moments(values, mask & rewarded)
    neutral_mean, neutral_variance = moments(values, mask & ~rewarded)
    mean = torch.where(rewarded, mean, neutral_mean)
    variance = torch.where(rewarded, variance, torch.maximum(variance, neutral_variance))
    return (values - mean) * torch.rsqrt(variance + std_floor**2 + 1e-8) * mask
