"""What a policy optimizer judges a rollout's answers by, prompt by prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.mapping.base import MappedReward
from moslim.policy.engines import Completions
from moslim.policy.kl import k1
from moslim.policy.optimizers import GroupScores
from moslim.policy.rollout import end_penalty


def group_scores(
    mapped: MappedReward,
    weights: Tensor,
    found: Completions,
    reference: Tensor | None,
    values: Tensor | None,
    missing_end_penalty: float,
    samples: int,
) -> GroupScores:
    """Puts what is known of ``N = G * n`` answers together.

    Args:
        mapped: Their rewards.
        weights: ``[N, D]`` of the dimensions.
        found: The answers.
        reference: ``[N, T]`` log-probabilities under the reference, or None.
        values: ``[N, T]`` the critic's, or None.
        missing_end_penalty: What an answer loses that was cut at the length limit.
        samples: Answers per prompt, ``n``.
    """
    kl = torch.zeros_like(found.logprobs) if reference is None else k1(found.logprobs, reference) * found.mask

    def grouped(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, samples))

    return GroupScores(
        total=grouped(mapped.total),
        per_dimension=grouped(mapped.per_dimension),
        penalty=grouped(end_penalty(found.ended, missing_end_penalty)),
        token_kl=grouped(kl),
        mask=grouped(found.mask),
        values=None if values is None else grouped(values),
        weights=grouped(weights),
    )
