"""Log-probabilities of sampled answers under the current weights."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moslim.policy.packing import (
    AnswerBatch,
    Chunk,
    Passes,
    SharedPrompts,
    chunks_by_length,
    shared_prompts,
    sharing_pays,
)
from moslim.policy.predictor import Predictor, continues


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


def answer_states(predictor: Predictor, plan: Plan) -> Iterator[tuple[Chunk, Tensor]]:
    """Runs a model over answers.

    Returns:
        For each chunk, what predicts its tokens: ``[C, T', H or V]``.
    """
    for chunk in plan.whole:
        yield chunk, _states(predictor, chunk.mask.shape[1] + 1, chunk.input_ids, chunk.attention_mask)[:, :-1]
    for prompts in plan.shared:
        yield from _continued(predictor, prompts)


def _continued(predictor: Predictor, prompts: SharedPrompts) -> Iterator[tuple[Chunk, Tensor]]:
    """Computes each prompt once; the gradients of all its answers meet in its keys and values."""
    cache = DynamicCache(config=predictor.model.config)
    last = _states(predictor, 1, prompts.input_ids, prompts.attention_mask, cache)
    for chunk, owners in zip(prompts.chunks, prompts.owners, strict=True):
        states = last.index_select(0, owners)
        width = chunk.mask.shape[1] - 1  # the last token predicts nothing that is asked for
        if width:
            ids, attention = chunk.tokens[:, :-1], chunk.attention_mask[:, :-1]
            states = torch.cat([states, _states(predictor, width, ids, attention, _branch(cache, owners))], dim=1)
        yield chunk, states


def _states(
    predictor: Predictor, keep: int, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None
) -> Tensor:
    """States at the last ``keep`` positions; the mask also covers what the cache holds."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    if cache is None:
        return predictor.states(keep, **inputs, use_cache=False)
    return predictor.states(keep, **inputs, past_key_values=cache, use_cache=True)


def _branch(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that begins with some rows of another, which stays as it is; gradients flow into that."""
    branch = copy(cache)
    layers: list[Any] = [copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
    branch.layers = layers
    return branch


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
