"""How answers are put into forward passes: in chunks of like length, with each prompt computed once for its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SharePrompts = Literal["auto", "always", "never"]
"""Whether each prompt is computed once for all its answers; ``auto``: where enough tokens are saved."""
_WORTHWHILE = 0.8
"""Sharing must leave at most this part of the tokens: two passes in place of one have a cost of their own."""
_HELD = 8
"""Answers that share a pass, each with a copy of its prompt's keys and values, hold at most so many positions for each
token that the pass may compute."""


def pass_tokens(device: torch.device) -> int:
    """Most tokens, padding included, that it pays to compute at once: on a CPU, small passes stay in its caches."""
    return 1024 if device.type == "cpu" else 32768


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position of every token, counted from the first one that is not padding: ``[B, T]`` to ``[B, T]``."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class Chunk:
    """Some answers of a batch, without columns that are padding in all of them.

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


@dataclass
class SharedPrompts:
    """Different prompts, and the chunks of their answers, which all have the prompts' width ``P'``.

    Args:
        input_ids: ``[G, P']``, left-padded.
        attention_mask: ``[G, P']``.
        chunks: The answers.
        owners: Per chunk ``[C]``, which of the prompts each of its answers is to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    chunks: list[Chunk]
    owners: list[Tensor]


@dataclass
class AnswerBatch:
    """``N`` answers with their prompts.

    Args:
        input_ids: ``[N, P + T]``, prompts left-padded, answers right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, answer tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        """``P``."""
        return self.input_ids.shape[1] - self.mask.shape[1]

    def to(self, device: torch.device) -> AnswerBatch:
        """The same on a device."""
        return AnswerBatch(self.input_ids.to(device), self.attention_mask.to(device), self.mask.to(device))

    def chunk(self, index: Tensor, prompt: int, answer: int) -> Chunk:
        """The answers at ``index``, cut to ``prompt`` and ``answer`` columns."""
        columns = slice(self.width - prompt, self.width + answer)
        ids, attention = self.input_ids[index, columns], self.attention_mask[index, columns]
        return Chunk(index, ids, attention, self.mask[index, :answer])


def chunks_by_length(batch: AnswerBatch, tokens: int, among: Tensor | None = None) -> Iterator[Chunk]:
    """Cuts a batch into chunks of like length, so that little padding is computed.

    Args:
        batch: ``N`` answers.
        tokens: Most tokens per chunk, padding included; a chunk has at least one answer.
        among: ``[M]`` positions to take; None = all.
    """
    prompts, answers = batch.attention_mask[:, : batch.width].sum(dim=1), batch.mask.sum(dim=1)
    rows = _shortest_first(prompts + answers, among)
    sizes = torch.stack([prompts[rows], answers[rows]], dim=1).tolist()
    for part, (prompt, answer) in within(sizes, tokens):
        yield batch.chunk(rows[part], prompt, answer)


def shared_prompts(batch: AnswerBatch, tokens: int, among: Tensor | None = None) -> Iterator[SharedPrompts]:
    """Groups a batch by prompt, found by its ids; see :func:`chunks_by_length` for the arguments.

    Where prompts are long, chunks are smaller: each holds at most ``8 * tokens`` positions, prompts included.
    """
    rows = torch.arange(len(batch.mask), device=batch.mask.device) if among is None else among
    if not len(rows):
        return
    shown, owner = distinct_prompts(batch, rows)
    lengths = batch.attention_mask[shown, : batch.width].sum(dim=1)
    order = lengths.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[owner]
    answers = batch.mask.sum(dim=1)
    for part, (width,) in within(lengths[order][:, None].tolist(), tokens):
        inside = (rank >= part.start) & (rank < part.stop)
        chosen = _shortest_first(answers[rows[inside]])
        members, owners = rows[inside][chosen], rank[inside][chosen] - part.start
        chunks, split = [], []
        for piece, (answer,) in within(answers[members][:, None].tolist(), tokens):
            most = max(1, _HELD * tokens // (width + answer))
            chunks += [batch.chunk(few, width, answer) for few in members[piece].split(most)]
            split += owners[piece].split(most)
        columns = slice(batch.width - width, batch.width)
        prompts = shown[order[part]]
        yield SharedPrompts(batch.input_ids[prompts, columns], batch.attention_mask[prompts, columns], chunks, split)


def distinct_prompts(batch: AnswerBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns one of the rows for each of ``G`` different prompts ``[G]``, and which of these each row has ``[M]``."""
    columns = slice(0, batch.width)
    ids = batch.input_ids[rows, columns].masked_fill(batch.attention_mask[rows, columns] == 0, -1)
    _, owner = ids.unique(dim=0, return_inverse=True)
    shown = owner.new_empty(int(owner.max()) + 1).scatter_(0, owner, rows)
    return shown, owner


def sharing_pays(batch: AnswerBatch, among: Tensor | None = None) -> bool:
    """Whether computing every prompt once leaves few enough tokens."""
    rows = torch.arange(len(batch.mask), device=batch.mask.device) if among is None else among
    if not len(rows):
        return False
    shown, _ = distinct_prompts(batch, rows)
    apart = batch.attention_mask[rows].sum()
    together = batch.attention_mask[shown, : batch.width].sum() + batch.mask[rows].sum()
    return bool(together <= _WORTHWHILE * apart)


def _shortest_first(lengths: Tensor, among: Tensor | None = None) -> Tensor:
    rows = torch.arange(len(lengths), device=lengths.device) if among is None else among
    return rows[lengths[rows].argsort(stable=True)]


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
