"""Prefix tree of token sequences: a beginning that several sequences share is one node, which a model computes once.

Three sequences, 10 tokens in all, begin with the same prompt (5, 6); two of them also share the token 7:

>>> import torch
>>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [5, 6, 9, 0]])  # 0 is padding
>>> tree = grow(ids, lengths=torch.tensor([4, 3, 3]))

They have five different beginnings, so the tree has five nodes. A node is the last token of its beginning:

>>> tree.tokens.tolist()  # of the beginnings 5, 5 6, 5 6 7, 5 6 7 8 and 5 6 9
[5, 6, 7, 8, 9]
>>> tree.positions.tolist()
[0, 1, 2, 3, 2]

A sequence is a path of nodes from the root (0 also fills the row behind its end):

>>> tree.nodes.tolist()
[[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 4, 0]]

The model computes the five tokens in one row without padding. Attention alone reads whole paths. The second sequence is
a part of the first, so two paths hold all nodes:

>>> tree.paths.tolist()
[[0, 1, 2, 3], [0, 1, 4, 0]]
>>> tree.cells.tolist()  # nodes 0 to 3 stand in the first path, node 4 in column 2 of the second
[0, 1, 2, 3, 6]

``model.passes.share_prefixes`` switches it for policy, reference, critic and classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
        tokens: ``[N, L]``.
        lengths: ``[N]``.
        order: ``[N]`` which of the sequences given each of them is.
        new: ``[N, L]`` bool, tokens up to which a sequence differs from all before it: one for each node of their tree.
    """

    tokens: Tensor
    lengths: Tensor
    order: Tensor
    new: Tensor

    def parts(self, tokens: int) -> Iterator[Sequences]:
        """Cuts them into parts whose trees have at most so many nodes.

        A part has at least one sequence; more than one read, sequence by sequence, at most eight times as many tokens.
        """
        own, lengths = self.new.sum(dim=1).tolist(), self.lengths.tolist()
        start, nodes, widest = 0, 0, 0
        for end, length in enumerate(lengths):
            nodes, widest = nodes + own[end], max(widest, length)
            if end > start and (nodes > tokens or (end + 1 - start) * widest > _HELD * tokens):
                yield self._part(start, end)
                start, nodes, widest = end, length, length
        if lengths:
            yield self._part(start, len(lengths))

    def tree(self) -> Tree:
        """Their tree; its ``nodes`` are in alphabetical order, too."""
        number = torch.full_like(self.tokens, -1)
        number[self.new] = torch.arange(int(self.new.sum()), device=number.device)
        nodes = number.cummax(dim=0).values.masked_fill(~_inside(self.tokens, self.lengths), 0)
        has_own = self.new.any(dim=1)
        return Tree(
            tokens=self.tokens[self.new],
            positions=self.new.nonzero()[:, 1],
            nodes=nodes,
            paths=nodes[has_own],
            cells=self.new[has_own].flatten().nonzero()[:, 0],
        )

    def _part(self, start: int, end: int) -> Sequences:
        lengths = self.lengths[start:end]
        width = int(lengths.max())
        tokens, new = self.tokens[start:end, :width], self.new[start:end, :width].clone()
        new[:1] = _inside(tokens[:1], lengths[:1])  # nothing is before it any more
        return Sequences(tokens, lengths, self.order[start:end], new)


def in_order(tokens: Tensor, lengths: Tensor) -> Sequences:
    """Sorts sequences.

    Args:
        tokens: ``[N, L]`` int64, each from column 0 on.
        lengths: ``[N]``.
    """
    inside = _inside(tokens, lengths)
    tokens = tokens.masked_fill(~inside, -1)
    keys = [row.tobytes() for row in tokens.cpu().numpy()]  # any order does in which like beginnings are neighbours
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.long, device=tokens.device)
    tokens, new = tokens[order], inside[order]
    new[1:] &= ~(tokens[1:] == tokens[:-1]).cumprod(dim=1).bool()
    return Sequences(tokens, lengths[order], order, new)


def grow(tokens: Tensor, lengths: Tensor) -> Tree:
    """Makes a tree of sequences, ``nodes`` in their own order; see :func:`in_order` for the arguments."""
    found = in_order(tokens, lengths)
    tree = found.tree()
    return replace(tree, nodes=tree.nodes[found.order.argsort()])


def _inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
