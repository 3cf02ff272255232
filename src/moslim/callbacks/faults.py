"""What can be wrong with a rollout or a step. Each function says what it found, or returns None."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moslim.policy.kl import k1
from moslim.processes import mean_over_processes


def kl_above(logprobs: Tensor, reference: Tensor | None, mask: Tensor, limit: float) -> str | None:
    """Compares the estimated KL divergence to the reference, in nats per answer, with a limit.

    The mean over all processes counts, each of which must ask. The reason is told by those that are not below it.

    Args:
        logprobs: ``[N, T]`` of the sampler.
        reference: ``[N, T]``; None where the run has no reference, and so no divergence.
        mask: ``[N, T]`` bool, answer tokens.
        limit: Nats per answer.
    """
    if reference is None:
        return None
    own = (k1(logprobs, reference) * mask).sum(dim=1).mean()
    kl = mean_over_processes(own)
    if kl <= limit or own < kl:  # false where either is NaN
        return None
    return f"the KL divergence to the reference is {float(kl):.4g} nats per answer, not within {limit:g}"


def off_policy(
    other: str, logprobs: Tensor, old: Tensor, mask: Tensor, tolerance: float, answers: bool = False
) -> str | None:
    """Finds probability ratios that are not 1 where the policy has not changed since it answered.

    Args:
        other: What ``old`` is of.
        logprobs: ``[N, T]`` in the update's forward pass.
        old: ``[N, T]``.
        mask: ``[N, T]`` bool, the answer tokens to compare; may be none.
        tolerance: Greatest mean of ``|log ratio|``; rounding in bfloat16 gives some hundredths per token.
        answers: Whether the ratios of whole answers count, the products of those of their tokens.
    """
    distance, counted = (logprobs - old) * mask, mask
    if answers:
        distance, counted = distance.sum(dim=1), mask.any(dim=1)
    mean = float((distance.abs() * counted).sum() / counted.sum().clamp(min=1))
    if mean <= tolerance:
        return None
    return (
        f"update and {other} disagree before the first step on a rollout: mean |log ratio| over "
        f"{'answers' if answers else 'tokens'} is {mean:.4g}, above {tolerance:g}"
    )


def identical(answers: Sequence[str], samples: int) -> str | None:
    """Finds that all answers to each prompt are the same, so that there is nothing to compare.

    Args:
        answers: ``G * n`` answers, those to one prompt adjacent.
        samples: Answers per prompt, ``n``; with one there is no comparison to lose.
    """
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    if samples < 2 or any(len(set(group)) > 1 for group in groups):
        return None
    return f"the {samples} answers to every prompt are the same, such as {answers[0][:80]!r}"


def truncated(ended: Tensor) -> str | None:
    """Finds that no answer of a rollout ended (``[N]`` bool) before the length limit."""
    return None if bool(ended.any()) else f"all {len(ended)} answers were cut at the length limit"
