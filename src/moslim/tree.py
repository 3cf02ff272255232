"""Token sequences as a tree, in which what several of them begin with is there once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_HELD = 8
"""The sequences of a part, each with all its tokens, hold at most so many of them for each node that the part may have:
attention reads every sequence whole."""


@dataclass
class Tree:
    """The ``U`` different beginnings, or nodes, of ``N`` sequences of up to ``L`` tokens.

    Args:
        tokens: ``[U]`` the token that each of them ends with.
        positions: ``[U]`` where that token stands, from 0.
        nodes: ``[N, L]`` the node of every token of the sequences; 0 behind their end.
        paths: ``[R, L]`` those rows of ``nodes`` that have all of them: what others repeat is left out.
        cells: ``[U]`` where each node stands in ``paths``, counted through.
    """

    tokens: Tensor
    positions: Tensor
    nodes: Tensor
    paths: Tensor
    cells: Tensor


@dataclass
class Sequences:
    """``N`` token sequences in alphabetical order, so that those with a common beginning are neighbours.

    Args:
        order: ``[N]`` which of the sequences given each of them is.
        lengths: ``[N]``.
        new: ``[N, L]`` bool, tokens up to which a sequence differs from all before it: one for each node of their tree.
    """

    order: Tensor
    lengths: Tensor
    new: Tensor

    def parts(self, tokens: int) -> Iterator[Tensor]:
        """Cuts them into parts whose trees have at most so many nodes; yields which of the sequences given are in each.

        A part has at least one sequence; more than one read, sequence by sequence, at most eight times as many tokens.
        """
        own, lengths = self.new.sum(dim=1).tolist(), self.lengths.tolist()
        start, nodes, widest = 0, 0, 0
        for end, length in enumerate(lengths):
            nodes, widest = nodes + own[end] if end > start else length, max(widest, length) if end > start else length
            if end > start and (nodes > tokens or (end + 1 - start) * widest > _HELD * tokens):
                yield self.order[start:end]
                start, nodes, widest = end, length, length
        if lengths:
            yield self.order[start:]


def in_order(tokens: Tensor, lengths: Tensor) -> Sequences:
    """Sorts sequences.

    Args:
        tokens: ``[N, L]`` int64, each from column 0 on.
        lengths: ``[N]``.
    """
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    tokens = tokens.masked_fill(~inside, -1)
    keys = [row.tobytes() for row in tokens.cpu().numpy()]  # any order does in which like beginnings are neighbours
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.long, device=tokens.device)
    tokens, new = tokens[order], inside[order]
    new[1:] &= ~(tokens[1:] == tokens[:-1]).cumprod(dim=1).bool()
    return Sequences(order, lengths[order], new)


def grow(tokens: Tensor, lengths: Tensor) -> Tree:
    """Makes a tree of sequences; see :func:`in_order` for the arguments."""
    found = in_order(tokens, lengths)
    number = torch.full_like(found.new, -1, dtype=torch.long)
    number[found.new] = torch.arange(int(found.new.sum()), device=tokens.device)
    inside = torch.arange(tokens.shape[1], device=tokens.device) < found.lengths[:, None]
    ordered = number.cummax(dim=0).values.masked_fill(~inside, 0)
    has_own = found.new.any(dim=1)
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(found.new)
    return Tree(
        tokens=tokens[found.order][found.new],
        positions=columns[found.new],
        nodes=torch.empty_like(ordered).index_copy_(0, found.order, ordered),
        paths=ordered[has_own],
        cells=found.new[has_own].flatten().nonzero()[:, 0],
    )
