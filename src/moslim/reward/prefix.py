"""Classifies answers behind their prompts, each of which is computed once for all its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from moslim.caches import branch, continues
from moslim.data.prompts import pad
from moslim.packing import AnswerBatch, shared_prompts, token_positions
from moslim.reward.classifier import PreferenceClassifier, is_causal
from moslim.reward.pooling import pool

Spans = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt and of an answer to it."""


def can_share(classifier: PreferenceClassifier, spans: Sequence[Spans]) -> bool:
    """Whether answers can go on from their prompts: the backbone looks back only, and there are prompts."""
    backbone = classifier.config.backbone
    looks_back = is_causal(backbone) and continues(classifier.backbone, backbone)
    return looks_back and all(prompt for prompt, _ in spans)


def joined(spans: Sequence[Spans], pad_id: int) -> AnswerBatch:
    """Prompts and answers as one batch."""
    prompts, before = pad([prompt for prompt, _ in spans], pad_id, left=True)
    answers, mask = pad([answer for _, answer in spans], pad_id, left=False)
    return AnswerBatch(torch.cat([prompts, answers], dim=1), torch.cat([before, mask], dim=1), mask.bool())


def shared_features(classifier: PreferenceClassifier, batch: AnswerBatch, tokens: int) -> Tensor:
    """Pooled hidden states of pairs, as :meth:`PreferenceClassifier.features` gives them.

    Args:
        classifier: The classifier.
        batch: ``N`` pairs, on its device.
        tokens: Most tokens per forward pass, padding included.

    Returns:
        ``[N, H]``.
    """
    parts, order = [], []
    for prompts in shared_prompts(batch, tokens):
        cache = DynamicCache(config=classifier.config.backbone)
        before = _states(classifier, prompts.input_ids, prompts.attention_mask, cache)
        for chunk, owners in zip(prompts.chunks, prompts.owners, strict=True):
            after = _states(classifier, chunk.tokens, chunk.attention_mask, branch(cache, owners))
            whole = torch.cat([before.index_select(0, owners), after], dim=1)
            parts.append(pool(whole, chunk.attention_mask, classifier.config.pooling))
            order.append(chunk.index)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _states(classifier: PreferenceClassifier, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Hidden states of ``ids``; the mask also covers what the cache holds."""
    positions = token_positions(mask)[:, -ids.shape[1] :]
    return classifier.states(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
