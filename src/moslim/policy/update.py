"""The forward pass of an update: log-probabilities of the answers, and what keeps the default behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslim.policy.logprobs import chunks_by_length, completion_logits, full_kl, token_logprobs
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout
from moslim.processes import mean_over_processes


@dataclass
class Forward:
    """What an update needs to know of the current policy.

    Args:
        logprobs: ``[N, T]`` float32 with gradient, 0 where masked.
        default_kl: Scalar with gradient: mean over the answer tokens of prompts without instruction of the exact
            KL(policy || reference), each process's part of it such that the mean over processes is that over all
            tokens; None if no process has such prompts or it was not asked for.
    """

    logprobs: Tensor
    default_kl: Tensor | None


def forward(policy: Any, roles: Roles, rows: Rollout, temperature: float, chunk_rows: int, default_kl: bool) -> Forward:
    """Runs the policy over a rollout in chunks of like length.

    Args:
        policy: The policy.
        roles: Gives the reference.
        rows: ``N`` answers.
        temperature: The sampler's.
        chunk_rows: Answers per forward pass.
        default_kl: Whether to compute the divergence on prompts without instruction.
    """
    uninstructed = rows.uninstructed if default_kl else torch.zeros_like(rows.uninstructed)
    logprobs = torch.zeros(rows.mask.shape, dtype=torch.float32, device=rows.mask.device)
    divergences: list[Tensor] = []
    batch = (rows.input_ids, rows.attention_mask, rows.mask, chunk_rows)
    for group, compared in ((~uninstructed, False), (uninstructed, True)):
        for chunk in chunks_by_length(*batch, group.nonzero()[:, 0]):
            inputs = (chunk.input_ids, chunk.attention_mask, chunk.mask.shape[1], temperature)
            logits = completion_logits(policy, *inputs)
            logprobs[chunk.index, : chunk.mask.shape[1]] = token_logprobs(logits, chunk.tokens, chunk.mask)
            if compared:
                with torch.no_grad(), roles.reference() as reference:
                    wanted = completion_logits(reference, *inputs)
                divergences.append(full_kl(logits[chunk.mask], wanted[chunk.mask]))
    if not default_kl:
        return Forward(logprobs, None)
    tokens = mean_over_processes(rows.mask[uninstructed].sum())
    divergence = torch.cat(divergences).sum() if divergences else logprobs.new_zeros(())
    return Forward(logprobs, divergence / tokens if tokens > 0 else None)
