"""Answers that were not drawn from the policy that learns from them: what it does about that, and how it is measured.

The sampler's weights may be older (a :class:`~moslim.policy.rollout.CompletionSource`), top-k and top-p leave tokens
out, and another program rounds in another way. Each token's, or answer's, part of the loss is then weighted by the
ratio of its probabilities under policy and sampler, truncated from above (IMPALA, arXiv 1802.01561; TRL calls it
``vllm_importance_sampling``). Probability ratios, clips and KL estimates go on comparing with the policy at the start
of the update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.policy.engines import Completions

OldLogprobs = Literal["auto", "recompute"]


@dataclass(frozen=True)
class OffPolicy:
    """What is done about answers that another policy sampled.

    Args:
        cap: Largest weight of a token or answer by which its part of the loss is corrected; None corrects nothing.
        old_logprobs: What probability ratios compare with after the first optimizer step on a rollout; before it, the
            policy is compared with itself. ``auto`` takes the engine's log-probabilities wherever it had the current
            weights, but makes a forward pass for them where numbers are rounded to fewer digits than float32 has;
            ``recompute`` always does, and corrects for the engine's rounding.

    Raises:
        UsageError: An option is out of range.
    """

    cap: float | None = 2.0
    old_logprobs: OldLogprobs = "auto"

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap >= 1:
            raise UsageError(f"off_policy.cap is {self.cap}: give 1 or more, or null for no correction")
        if self.old_logprobs not in get_args(OldLogprobs):
            raise UsageError(f"off_policy.old_logprobs is '{self.old_logprobs}': give 'auto' or 'recompute'")


def with_logprobs(found: Completions, logprobs: Tensor) -> Completions:
    """The same answers as the policy sees them; what they were drawn from is kept beside.

    Args:
        found: ``N`` answers of a sampler.
        logprobs: ``[N, T]`` under the policy that is about to learn.
    """
    sampler = found.logprobs if found.sampler_logprobs is None else found.sampler_logprobs
    return replace(found, logprobs=logprobs, sampler_logprobs=sampler)


def rounded_anew(
    logprobs: Tensor, old: Tensor, sampler: Tensor | None, in_process: bool
) -> tuple[Tensor, Tensor | None]:
    """Puts log-probabilities of another computation by the same weights in the place of earlier ones.

    What top-k and top-p made of the distribution is kept as the sampler measured it. The rounding of an engine in this
    process is taken for none; that of another program is corrected, as it may be more than rounding.

    Args:
        logprobs: ``[N, T]``, the new ones.
        old: ``[N, T]``, the earlier ones.
        sampler: ``[N, T]``, under what the tokens were drawn from; None = what ``old`` is of.
        in_process: Whether the engine computes with the policy itself.

    Returns:
        The new old log-probabilities, and those of the sampler.
    """
    if sampler is None:
        return logprobs, None if in_process else old
    return logprobs, logprobs - (old - sampler)


def reduced_precision(model: Any) -> bool:
    """Whether a model's passes round to fewer digits than float32 has, by its weights or by autocast."""
    return torch.is_autocast_enabled(model.device.type) or torch.finfo(model.dtype).eps > 1e-6
