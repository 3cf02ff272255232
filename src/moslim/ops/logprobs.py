"""Log-probabilities of completions under the current weights, and options of their forward passes."""

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
    """Options of the forward passes of policy, reference, critic and classifier. They do not change the results.

    Args:
        tokens: Most tokens per forward pass, padding included; None = 1024 on a CPU, where small passes stay in the
            cache, else 32768. Attention with shared prefixes may read up to eight times as many.
        share_prefixes: Compute prefixes that completions share (the prompt and common first tokens) once; ``auto``
            does so where enough tokens are saved. Unsupported architectures compute every completion separately.
        chunked_logprobs: Hold the logits of few tokens at a time, where the architecture allows it.
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
    """Interface of objects that run a model over tokens, such as a :class:`Predictor`."""

    model: Any

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """States ``[B, keep, ...]`` at the last positions, or at those given."""


@dataclass
class CompletionPass:
    """One forward pass and the ``A`` completion tokens that it predicts, of which ``M`` are different.

    Args:
        read: Input of the model: padded completions with their prompts, or a tree.
        before: ``[M]`` index, in the flattened pass, of the state that predicts each token.
        tokens: ``[M]`` the different tokens.
        rows: ``[A]`` index of each token's completion in the batch.
        columns: ``[A]`` position of each token in its completion, from 0.
        which: ``[A]`` index into ``tokens``; None = ``tokens`` in order.
        keep: Number of last positions of a padded pass that are kept.
    """

    read: Chunk | Tree
    before: Tensor
    tokens: Tensor
    rows: Tensor
    columns: Tensor
    which: Tensor | None = None
    keep: int = 0

    def states(self, reader: Reader) -> Tensor:
        """Runs the model and returns the states ``[M, H or V]`` that predict the tokens."""
        if isinstance(self.read, Tree):
            needed, places = self.before.unique(return_inverse=True)
            with along(transformer_part(reader.model), self.read) as inputs:
                return reader.states(needed, **inputs)[0].index_select(0, places)
        ids, attention = self.read.input_ids, self.read.attention_mask
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": token_positions(attention)}
        found = reader.states(self.keep, **inputs, use_cache=False)
        return found.flatten(0, 1).index_select(0, self.before)

    def spread(self, values: Tensor) -> Tensor:
        """Expands values of the different tokens ``[M]`` to all ``[A]``."""
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
    """A pass with all padding behind the completions, for models whose states left padding would change."""
    ids, attention = chunk.input_ids, chunk.attention_mask
    width, prompt = ids.shape[1], ids.shape[1] - chunk.mask.shape[1]
    lengths = attention[:, :prompt].sum(dim=1)
    places = (torch.arange(width, device=ids.device) + (prompt - lengths)[:, None]) % width
    moved = Chunk(chunk.index, ids.gather(1, places), attention.gather(1, places), chunk.mask)
    rows, columns = chunk.mask.nonzero(as_tuple=True)
    before = rows * width + lengths[rows] + columns - 1
    return CompletionPass(moved, before, chunk.tokens[chunk.mask], chunk.index[rows], columns, keep=width)


def _of_tree(batch: CompletionBatch, index: Tensor, ids: Tensor, part: Sequences) -> CompletionPass:
    """A pass over the tree of ``part``; ``index`` and ``ids`` are its completions and their tokens with prompts."""
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
    """Log-probabilities of all completion tokens.

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
