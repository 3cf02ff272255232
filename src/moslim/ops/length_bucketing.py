"""Batches of completions with their prompts, cut into chunks of similar length for forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SharePrefixes = Literal["auto", "always", "never"]
"""Computation of shared prefixes: ``auto`` computes them once where enough tokens are saved."""
_WORTHWHILE = 0.8
"""Sharing must leave at most this part of the tokens: attention along the paths of a tree has a cost of its own."""


def pass_tokens(device: torch.device) -> int:
    """Most tokens, padding included, that it pays to compute at once: on a CPU, small passes stay in its caches."""
    return 1024 if device.type == "cpu" else 32768


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position of every token, counted from the first one that is not padding: ``[B, T]`` to ``[B, T]``."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class Chunk:
    """Some completions of a batch, without columns that are padding in all of them.

    Args:
        index: ``[C]`` their indices in the batch.
        input_ids: ``[C, P' + T']``.
        attention_mask: ``[C, P' + T']``.
        mask: ``[C, T']`` bool, completion tokens.
    """

    index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    @property
    def tokens(self) -> Tensor:
        """``[C, T']`` completion tokens."""
        return self.input_ids[:, -self.mask.shape[1] :]


@dataclass
class CompletionBatch:
    """``N`` completions with their prompts.

    Args:
        input_ids: ``[N, P + T]``, prompts left-padded, completions right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, completion tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        """Width ``P`` of the prompts."""
        return self.input_ids.shape[1] - self.mask.shape[1]

    def sequences(self, among: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts and completions at ``among`` ``[M]`` from column 0 on, ``[M, L]``, and their lengths ``[M]``."""
        attention = self.attention_mask[among]
        lengths = attention.sum(dim=1)
        columns = torch.arange(int(lengths.max()), device=among.device)
        starts = self.width - attention[:, : self.width].sum(dim=1)
        places = (starts[:, None] + columns).clamp(max=attention.shape[1] - 1)
        return self.input_ids[among].gather(1, places), lengths

    def chunk(self, index: Tensor, prompt: int, answer: int) -> Chunk:
        """The completions at ``index``, cut to ``prompt`` and ``answer`` columns."""
        columns = slice(self.width - prompt, self.width + answer)
        ids, attention = self.input_ids[index, columns], self.attention_mask[index, columns]
        return Chunk(index, ids, attention, self.mask[index, :answer])


def chunks_by_length(batch: CompletionBatch, tokens: int, among: Tensor | None = None) -> Iterator[Chunk]:
    """Cuts a batch into chunks of similar length to reduce padding.

    Args:
        batch: ``N`` completions.
        tokens: Most tokens per chunk, padding included; a chunk has at least one completion.
        among: ``[M]`` positions to take; None = all.
    """
    prompts, answers = batch.attention_mask[:, : batch.width].sum(dim=1), batch.mask.sum(dim=1)
    rows = torch.arange(len(answers), device=answers.device) if among is None else among
    rows = rows[(prompts + answers)[rows].argsort(stable=True)]
    sizes = torch.stack([prompts[rows], answers[rows]], dim=1).tolist()
    for part, (prompt, answer) in within(sizes, tokens):
        yield batch.chunk(rows[part], prompt, answer)


def worthwhile(nodes: int, tokens: int) -> bool:
    """Whether a tree of so many nodes is to be computed in place of so many tokens."""
    return nodes <= _WORTHWHILE * tokens


def like_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yields rows, shortest first, in groups of at most so many padded tokens; a group has at least one row."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for part, _ in within([[lengths[row]] for row in order], tokens):
        yield order[part]


def within(sizes: list[list[int]], tokens: int) -> Iterator[tuple[slice, list[int]]]:
    """Cuts rows into parts of at most so many tokens; yields each with the widths that its rows are padded to.

    Args:
        sizes: Per row, the lengths of its spans (prompt, answer), which are padded one by one.
        tokens: Most tokens of a part; it has at least one row.
    """
    start, widest = 0, [0]
    for end, spans in enumerate(sizes):
        wider = [max(pair) for pair in zip(widest, spans, strict=True)] if end > start else spans
        if end > start and (end + 1 - start) * sum(wider) > tokens:
            yield slice(start, end), widest
            start, wider = end, spans
        widest = wider
    if sizes:
        yield slice(start, len(sizes)), widest
