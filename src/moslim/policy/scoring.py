"""What a rollout's answers are worth, and what a policy optimizer judges them by, prompt by prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.mapping.base import MappedReward, MappingFunction
from moslim.policy.engines import Completions
from moslim.policy.kl import k1
from moslim.policy.optimizers import GroupScores
from moslim.policy.rollout import end_penalty
from moslim.precision import full_precision
from moslim.processes import of_all_processes, process_rank
from moslim.sampling import PreferenceSampler


@full_precision()
def map_rewards(
    mapping: MappingFunction, sampler: PreferenceSampler | None, probs: Tensor, targets: Tensor, samples: int
) -> MappedReward:
    """Rewards of this process's answers; mapping and sampler see those of all, and so need not know of processes.

    Args:
        mapping: The mapping function.
        sampler: What draws requests, for its statistics; None where there is none.
        probs: ``[N, D, K]`` level probabilities.
        targets: ``[N, D]`` requested levels.
        samples: Answers per prompt.
    """
    all_probs, all_targets = of_all_processes(probs), of_all_processes(targets)
    mapping.observe(all_probs, all_targets)
    if sampler is not None:
        sampler.observe(mapping.preferences, all_probs, all_targets)
    groups = torch.arange(len(all_probs), device=probs.device) // samples
    mapped = mapping(all_probs, all_targets, groups)
    own = slice(process_rank() * len(probs), (process_rank() + 1) * len(probs))
    return MappedReward(mapped.total[own], mapped.per_dimension[own], mapped.weights[own])


@full_precision()
def group_scores(
    mapped: MappedReward,
    found: Completions,
    reference: Tensor | None,
    values: Tensor | None,
    missing_end_penalty: float,
    samples: int,
) -> GroupScores:
    """Puts what is known of ``N = G * n`` answers together.

    Args:
        mapped: Their rewards.
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
        weights=grouped(mapped.weights),
    )
