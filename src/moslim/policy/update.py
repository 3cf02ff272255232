"""The forward pass of an update: log-probabilities of the answers, and what keeps the default behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslim.policy.logprobs import answer_states, plan, put
from moslim.policy.packing import Passes
from moslim.policy.predictor import Predictor
from moslim.policy.processes import mean_over_processes
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout


@dataclass
class Forward:
    """What an update needs to know of the current policy.

    Args:
        logprobs: ``[N, T]`` float32 with gradient, 0 where masked.
        default_kl: Scalar with gradient: mean over the answer tokens of prompts without instruction of the exact
            KL(policy || reference), each process's part of it such that the mean over processes is that over all
            tokens; None if no process has such prompts or it was not asked for.
        entropy: Scalar with gradient: mean over this process's answer tokens of the next-token entropy, nats.
    """

    logprobs: Tensor
    default_kl: Tensor | None
    entropy: Tensor


def forward(policy: Any, roles: Roles, rows: Rollout, temperature: float, passes: Passes, default_kl: bool) -> Forward:
    """Runs the policy over a rollout.

    Args:
        policy: The policy.
        roles: Gives the reference.
        rows: ``N`` answers.
        temperature: The sampler's.
        passes: How the answers are computed.
        default_kl: Whether to compute the divergence on prompts without instruction.
    """
    uninstructed = rows.uninstructed if default_kl else torch.zeros_like(rows.uninstructed)
    logprobs = torch.zeros(rows.mask.shape, dtype=torch.float32, device=rows.mask.device)
    divergence, entropy = logprobs.new_zeros(2).unbind()
    predictor = Predictor(policy, passes.chunked_logprobs)
    for group, compared in ((~uninstructed, False), (uninstructed, True)):
        chosen = plan(policy, rows.batch, passes, group.nonzero()[:, 0])
        references: list[tuple[Predictor, Tensor]] = []
        if compared:
            with torch.no_grad(), roles.reference() as reference:
                other = Predictor(reference, passes.chunked_logprobs)
                references = [(other, states) for _, states in answer_states(other, chosen)]
        for number, (chunk, states) in enumerate(answer_states(predictor, chosen)):
            wanted = (references[number][0], references[number][1][chunk.mask]) if compared else None
            tokens = chunk.tokens[chunk.mask]
            found = predictor.statistics(states[chunk.mask], tokens, temperature, True, wanted)
            put(logprobs, chunk, found.logprobs)
            if found.entropy is not None:
                entropy = entropy + found.entropy.sum()
            if found.kl is not None:
                divergence = divergence + found.kl.sum()
    entropy = entropy / rows.mask.sum().clamp(min=1)
    if not default_kl:
        return Forward(logprobs, None, entropy)
    tokens = mean_over_processes(rows.mask[uninstructed].sum())
    return Forward(logprobs, divergence / tokens if tokens > 0 else None, entropy)
