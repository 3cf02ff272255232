"""Log-probabilities of sampled answers under the current weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def completion_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, temperature: float) -> Tensor:
    """Tempered logits at the positions that predict the last ``length`` tokens.

    Args:
        model: Causal language model in the Hugging Face form.
        input_ids: ``[N, P + T]``, prompts left-padded, answers right-padded.
        attention_mask: ``[N, P + T]``.
        length: Number of answer tokens ``T``.
        temperature: The sampler's temperature; 0 (greedy) is taken as 1.

    Returns:
        ``[N, T, V]`` in the model's dtype.
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits = output.logits[:, :-1]
    return logits if temperature in (0, 1) else logits / temperature


def _negative_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits.float(), tokens, reduction="none")


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor, chunk: int = 4096) -> Tensor:
    """Log-probabilities of ``tokens``; padding is skipped and costs nothing.

    Args:
        logits: ``[N, T, V]``.
        tokens: ``[N, T]``.
        mask: ``[N, T]`` bool.
        chunk: Tokens whose float32 log-softmax is held at a time.

    Returns:
        ``[N, T]`` float32, 0 where masked.
    """
    flat, wanted = logits[mask], tokens[mask]
    parts = []
    for start in range(0, len(wanted), chunk):
        piece, target = flat[start : start + chunk], wanted[start : start + chunk]
        if torch.is_grad_enabled() and len(wanted) > chunk:
            parts.append(checkpoint(_negative_logprobs, piece, target, use_reentrant=False))
        else:
            parts.append(_negative_logprobs(piece, target))
    negative = torch.cat(parts) if parts else flat.new_zeros(0, dtype=torch.float32)
    return torch.zeros(mask.shape, dtype=torch.float32, device=logits.device).masked_scatter(mask, -negative)


@dataclass
class Chunk:
    """Some answers of a batch, without the columns that are padding in all of them.

    Args:
        index: ``[C]`` where they stand in the batch.
        input_ids: ``[C, P' + T']``.
        attention_mask: ``[C, P' + T']``.
        mask: ``[C, T']`` bool, answer tokens.
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    @property
    def tokens(self) -> Tensor:
        """``[C, T']`` answer tokens."""
        return self.input_ids[:, -self.mask.shape[1] :]


def chunks_by_length(
    input_ids: Tensor, attention_mask: Tensor, mask: Tensor, rows: int, among: Tensor | None = None
) -> Iterator[Chunk]:
    """Cuts a batch into chunks of like length: little padding is computed, and a chunk fits the cache.

    Args:
        input_ids: ``[N, P + T]``, prompts left-padded, answers right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, answer tokens.
        rows: Answers per chunk.
        among: ``[M]`` positions to take; None = all.
    """
    positions = torch.arange(len(mask), device=mask.device) if among is None else among
    order = positions[mask[positions].sum(dim=1).argsort(stable=True)]
    for index in order.split(rows) if len(order) else ():
        own = mask[index]
        longest = int(own.sum(dim=1).max())
        attention = attention_mask[index, : attention_mask.shape[1] - mask.shape[1] + longest]
        first = int(attention.any(dim=0).nonzero()[0])
        yield Chunk(index, input_ids[index, first : attention.shape[1]], attention[:, first:], own[:, :longest])


def answer_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float, rows: int
) -> Tensor:
    """Log-probabilities of whole answers; see :func:`chunks_by_length` for the arguments.

    Returns:
        ``[N, T]`` float32, 0 where masked.
    """
    result = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for chunk in chunks_by_length(input_ids, attention_mask, mask, rows):
        width = chunk.mask.shape[1]
        logits = completion_logits(model, chunk.input_ids, chunk.attention_mask, width, temperature)
        result[chunk.index, :width] = token_logprobs(logits, chunk.tokens, chunk.mask)
    return result


def full_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Exact KL divergence of two next-token distributions, ``sum_v p(v) (log p(v) - log q(v))``.

    Args:
        logits: ``[.., V]`` of ``p``, the policy.
        reference: ``[.., V]`` of ``q``.

    Returns:
        ``[..]`` float32, nats.
    """
    p, q = logits.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
