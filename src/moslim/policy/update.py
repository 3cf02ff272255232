"""The forward pass of an update: what the loss needs to know of the current policy, and what keeps its default."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moslim.policy.critic import hidden_states
from moslim.policy.logprobs import chunks_by_length, completion_logits, full_kl, token_logprobs
from moslim.policy.optimizers import UpdateBatch
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout
from moslim.processes import mean_over_processes


def forward(
    roles: Roles,
    rows: Rollout,
    length: int,
    samples: int,
    temperature: float,
    chunk_rows: int,
    entropy: bool = False,
    default_kl: bool = False,
) -> tuple[UpdateBatch, Tensor | None]:
    """Runs policy and critic over a rollout in chunks of like length. Answers that nothing needs are skipped.

    Args:
        roles: Policy, critic and reference.
        rows: ``N`` answers.
        length: The engine's length limit.
        samples: Answers per prompt.
        temperature: The sampler's.
        chunk_rows: Answers per forward pass.
        entropy: Whether to compute the entropy of the (tempered) distributions.
        default_kl: Whether to compute the divergence on prompts without instruction.

    Returns:
        What the loss needs, and, if asked for, a scalar with gradient: the mean over the answer tokens of prompts
        without instruction of the exact KL(policy || reference), each process's part of it such that the mean over
        processes is that over all tokens; None if no process has such prompts.
    """
    uninstructed = rows.uninstructed if default_kl else torch.zeros_like(rows.uninstructed)
    needed = rows.used | uninstructed
    if not needed.any():
        needed[0] = True  # its mask is empty, but every process must have a gradient, be it zero
    logprobs = torch.zeros(rows.mask.shape, dtype=torch.float32, device=rows.mask.device)
    entropies = torch.zeros_like(logprobs) if entropy else None
    values = torch.zeros_like(logprobs) if roles.critic_shares_trunk else None
    divergences: list[Tensor] = []
    batch = (rows.input_ids, rows.attention_mask, rows.mask, chunk_rows)
    for group, compared in ((needed & ~uninstructed, False), (uninstructed, True)):
        for chunk in chunks_by_length(*batch, group.nonzero()[:, 0]):
            width = chunk.mask.shape[1]
            place = (chunk.index, slice(width))
            inputs = (chunk.input_ids, chunk.attention_mask, width, temperature)
            reading: AbstractContextManager[list[Tensor]] = nullcontext([])
            if values is not None:
                reading = hidden_states(roles.policy)
            with reading as hidden:
                logits = completion_logits(roles.policy, *inputs)
            logprobs[place] = token_logprobs(logits, chunk.tokens, chunk.mask)
            if entropies is not None:
                entropies[place] = token_entropy(logits, chunk.mask)
            if values is not None and roles.critic is not None:
                values[place] = roles.critic(hidden[-1], chunk.mask)
            if compared:
                with torch.no_grad(), roles.reference() as reference:
                    wanted = completion_logits(reference, *inputs)
                divergences.append(full_kl(logits[chunk.mask], wanted[chunk.mask]))
    if roles.critic is not None and values is None:
        values = roles.values(*batch, needed.nonzero()[:, 0])
    update = UpdateBatch(
        logprobs=logprobs,
        old=rows.old_logprobs,
        advantages=rows.advantages,
        mask=rows.mask & rows.used[:, None],
        length=length,
        samples=samples,
        reference=rows.reference_logprobs,
        entropy=entropies,
        values=values,
        old_values=rows.values,
        returns=rows.returns,
    )
    if not default_kl:
        return update, None
    tokens = mean_over_processes(rows.mask[uninstructed].sum())
    divergence = torch.cat(divergences).sum() if divergences else logprobs.new_zeros(())
    return update, divergence / tokens if tokens > 0 else None


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Entropy of next-token distributions in nats: ``[N, T, V]`` to ``[N, T]`` float32, 0 where masked."""
    logp = logits[mask].float().log_softmax(dim=-1)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    return torch.zeros(mask.shape, dtype=torch.float32, device=logits.device).masked_scatter(mask, entropy)
