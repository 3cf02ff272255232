"""Log-probabilities of completions under the current weights, and options of their forward passes.

How log-probabilities of answers are computed.

Log-probabilities of sampled answers under the current weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from moslim.ops.chunked_linear import Predictor
from moslim.ops.length_bucketing import (
    Chunk,
    CompletionBatch,
    SharePrefixes,
    chunks_by_length,
    pass_tokens,
    token_positions,
    worthwhile,
)
from moslim.ops.loading import transformer_part, unwrapped
from moslim.ops.prefix_tree import Sequences, Tree, along, in_order, masks_left_padding, reads_trees
from moslim.utils.errors import UsageError


@dataclass(frozen=True)
class ForwardConfig:
    """How answers are put through policy, reference, critic and classifier. All ways give the same numbers.

    Args:
        tokens: Most tokens per forward pass, padding included; None = 1024 on a CPU, where small passes stay in the
            cache, else 32768. Attention reads shared beginnings answer by answer: up to eight times as many.
        share_prefixes: Compute what answers begin with once: their prompt, and the words that they have in common;
            ``auto`` does where enough tokens are saved. Architectures that cannot compute every answer whole.
        chunked_logprobs: Never hold the logits of all tokens; where the architecture forbids that, they are held.
    """

    tokens: int | None = None
    share_prefixes: SharePrefixes = "auto"
    chunked_logprobs: bool = True

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"forward_config.tokens is {self.tokens}: give 1 or more")
        if self.share_prefixes not in get_args(SharePrefixes):
            raise UsageError(
                f"forward_config.share_prefixes is '{self.share_prefixes}': give 'auto', 'always' or 'never'"
            )

    def limit(self, device: torch.device) -> int:
        """Most tokens per forward pass on a device."""
        return self.tokens or pass_tokens(device)


class Reader(Protocol):
    """What runs a model over tokens: a :class:`Predictor`, or whatever else wants its states."""

    model: Any

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """States ``[B, keep, ...]`` at the last positions, or at those given."""


@dataclass
class CompletionPass:
    """One forward pass, and the ``A`` answer tokens that it predicts, of which ``M`` are told apart.

    Args:
        read: What the model is given: padded answers with their prompts, or all as a tree.
        before: ``[M]`` the position of the pass, counted through, whose state predicts each of the tokens.
        tokens: ``[M]``.
        rows: ``[A]`` answers of the batch ...
        columns: ``[A]`` ... and places in them, from 0.
        which: ``[A]`` which of the tokens stands there; None = one after the other.
        keep: How many positions of a padded pass, from its end, are counted through.
    """

    read: Chunk | Tree
    before: Tensor
    tokens: Tensor
    rows: Tensor
    columns: Tensor
    which: Tensor | None = None
    keep: int = 0

    def states(self, reader: Reader) -> Tensor:
        """Runs a model; its states ``[M, H or V]`` before the tokens."""
        if isinstance(self.read, Tree):
            needed, places = self.before.unique(return_inverse=True)
            with along(transformer_part(reader.model), self.read) as inputs:
                return reader.states(needed, **inputs)[0].index_select(0, places)
        ids, attention = self.read.input_ids, self.read.attention_mask
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": token_positions(attention)}
        found = reader.states(self.keep, **inputs, use_cache=False)
        return found.flatten(0, 1).index_select(0, self.before)

    def spread(self, values: Tensor) -> Tensor:
        """From values of the different tokens ``[M]`` to all ``[A]``."""
        return values if self.which is None else values.index_select(0, self.which)

    def put(self, target: Tensor, values: Tensor) -> None:
        """Writes values of the different tokens ``[M]`` into ``[N, T]``."""
        target[self.rows, self.columns] = self.spread(values)


def plan(
    model: Any, batch: CompletionBatch, forward_config: ForwardConfig, among: Tensor | None = None
) -> list[CompletionPass]:
    """Chooses the forward passes.

    Args:
        model: The causal language model that will take a gradient through them, if any does.
        batch: ``N`` answers.
        forward_config: How they may be computed.
        among: ``[M]`` positions to take; None = all.
    """
    device = batch.mask.device
    tokens = forward_config.limit(device)
    rows = torch.arange(len(batch.mask), device=device) if among is None else among
    if not len(rows):
        return []
    if forward_config.share_prefixes != "never" and reads_trees(transformer_part(model), device):
        ids, lengths = batch.sequences(rows)
        lengths = lengths - 1  # the last token predicts nothing that is asked for
        found = in_order(ids, lengths)
        if forward_config.share_prefixes == "always" or worthwhile(int(found.new.sum()), int(lengths.sum())):
            return [_of_tree(batch, rows[part.order], ids[part.order], part) for part in found.parts(tokens)]
    padded = _padded if masks_left_padding(unwrapped(model)) else _from_the_left
    return [padded(chunk) for chunk in chunks_by_length(batch, tokens, among)]


def _padded(chunk: Chunk) -> CompletionPass:
    mask = chunk.mask
    keep = mask.shape[1] + 1
    states = torch.arange(mask.shape[0] * keep, device=mask.device).view(mask.shape[0], -1)
    rows, columns = mask.nonzero(as_tuple=True)
    return CompletionPass(chunk, states[:, :-1][mask], chunk.tokens[mask], chunk.index[rows], columns, keep=keep)


def _from_the_left(chunk: Chunk) -> CompletionPass:
    """The same with all padding behind the answers, for models that it would otherwise change."""
    ids, attention = chunk.input_ids, chunk.attention_mask
    width, prompt = ids.shape[1], ids.shape[1] - chunk.mask.shape[1]
    lengths = attention[:, :prompt].sum(dim=1)
    places = (torch.arange(width, device=ids.device) + (prompt - lengths)[:, None]) % width
    moved = Chunk(chunk.index, ids.gather(1, places), attention.gather(1, places), chunk.mask)
    rows, columns = chunk.mask.nonzero(as_tuple=True)
    before = rows * width + lengths[rows] + columns - 1
    return CompletionPass(moved, before, chunk.tokens[chunk.mask], chunk.index[rows], columns, keep=width)


def _of_tree(batch: CompletionBatch, index: Tensor, ids: Tensor, part: Sequences) -> CompletionPass:
    """A tree of some of the answers, ``ids`` with their prompts, of which ``part`` is computed."""
    tree = part.tree()
    rows, columns = batch.mask[index].nonzero(as_tuple=True)
    prompts = batch.attention_mask[index, : batch.width].sum(dim=1)
    at = prompts[rows] + columns
    before, tokens = tree.nodes[rows, at - 1], ids[rows, at]
    most = tokens.max() + 1
    different, which = (before * most + tokens).unique(return_inverse=True)
    return CompletionPass(tree, different // most, different % most, index[rows], columns, which)


def completion_logprobs(
    model: Any, batch: CompletionBatch, temperature: float, forward_config: ForwardConfig
) -> Tensor:
    """Log-probabilities of whole answers.

    Args:
        model: Causal language model in the Hugging Face form.
        batch: ``N`` answers.
        temperature: The sampler's; 0 (greedy) is taken as 1.
        forward_config: How they are computed.

    Returns:
        ``[N, T]`` float32 or finer, 0 where masked.
    """
    predictor = Predictor(model, forward_config.chunked_logprobs)
    result = torch.zeros(batch.mask.shape, dtype=predictor.dtype, device=batch.mask.device)
    for one in plan(model, batch, forward_config):
        one.put(result, predictor.statistics(one.states(predictor), one.tokens, temperature).logprobs)
    return result
