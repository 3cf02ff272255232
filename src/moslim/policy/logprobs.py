"""Log-probabilities of sampled answers under the current weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from moslim.caches import branch
from moslim.packing import (
    AnswerBatch,
    Chunk,
    SharedPrompts,
    chunks_by_length,
    shared_prompts,
    sharing_pays,
    token_positions,
)
from moslim.policy.passes import Passes
from moslim.policy.predictor import Predictor, continues


class Reader(Protocol):
    """What runs a model over tokens: a :class:`Predictor`, or whatever else wants its states."""

    model: Any

    def states(self, keep: int, **inputs: Any) -> Tensor:
        """States ``[B, keep, ...]`` at the last positions."""


@dataclass
class Plan:
    """Which forward passes a batch takes: answers with their prompts, or continuing shared ones."""

    whole: list[Chunk]
    shared: list[SharedPrompts]


def plan(model: Any, batch: AnswerBatch, passes: Passes, among: Tensor | None = None) -> Plan:
    """Chooses the forward passes.

    Args:
        model: The model that will take a gradient through them, if any does.
        batch: ``N`` answers.
        passes: How they may be computed.
        among: ``[M]`` positions to take; None = all.
    """
    tokens = passes.limit(batch.mask.device)
    wanted = passes.share_prompts == "always" or (passes.share_prompts == "auto" and sharing_pays(batch, among))
    if wanted and continues(model):
        return Plan([], list(shared_prompts(batch, tokens, among)))
    return Plan(list(chunks_by_length(batch, tokens, among)), [])


def answer_states(reader: Reader, plan: Plan) -> Iterator[tuple[Chunk, Tensor]]:
    """Runs a model over answers.

    Returns:
        For each chunk, the states before its tokens, which predict them: ``[C, T', H or V]``.
    """
    for chunk in plan.whole:
        yield chunk, _states(reader, chunk.mask.shape[1] + 1, chunk.input_ids, chunk.attention_mask)[:, :-1]
    for prompts in plan.shared:
        yield from _continued(reader, prompts)


def _continued(reader: Reader, prompts: SharedPrompts) -> Iterator[tuple[Chunk, Tensor]]:
    """Computes each prompt once; the gradients of all its answers meet in its keys and values."""
    cache = DynamicCache(config=reader.model.config)
    last = _states(reader, 1, prompts.input_ids, prompts.attention_mask, cache)
    for chunk, owners in zip(prompts.chunks, prompts.owners, strict=True):
        states = last.index_select(0, owners)
        width = chunk.mask.shape[1] - 1  # the last token predicts nothing that is asked for
        if width:
            ids, attention = chunk.tokens[:, :-1], chunk.attention_mask[:, :-1]
            states = torch.cat([states, _states(reader, width, ids, attention, branch(cache, owners))], dim=1)
        yield chunk, states


def _states(
    reader: Reader, keep: int, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None
) -> Tensor:
    """States at the last ``keep`` positions; the mask also covers what the cache holds."""
    positions = token_positions(attention_mask)[:, -input_ids.shape[1] :]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    if cache is None:
        return reader.states(keep, **inputs, use_cache=False)
    return reader.states(keep, **inputs, past_key_values=cache, use_cache=True)


def answer_logprobs(model: Any, batch: AnswerBatch, temperature: float, passes: Passes) -> Tensor:
    """Log-probabilities of whole answers.

    Args:
        model: Causal language model in the Hugging Face form.
        batch: ``N`` answers.
        temperature: The sampler's; 0 (greedy) is taken as 1.
        passes: How they are computed.

    Returns:
        ``[N, T]`` float32 or finer, 0 where masked.
    """
    predictor = Predictor(model, passes.chunked_logprobs)
    result = torch.zeros(batch.mask.shape, dtype=predictor.dtype, device=batch.mask.device)
    for chunk, states in answer_states(predictor, plan(model, batch, passes)):
        found = predictor.statistics(states[chunk.mask], chunk.tokens[chunk.mask], temperature)
        put(result, chunk, found.logprobs)
    return result


def put(target: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Writes one number per answer token of a chunk into ``[N, T]``."""
    rows = torch.zeros_like(chunk.mask, dtype=values.dtype).masked_scatter(chunk.mask, values)
    target[chunk.index, : chunk.mask.shape[1]] = rows
