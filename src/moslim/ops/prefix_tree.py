"""Prefix tree of token sequences: a prefix that several sequences share is computed once.

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

``model.forward_config.share_prefixes`` switches it for policy, reference, critic and classifier.

In attention, each token sees its own prefix. Models that carry a state from token to token (convolutions, state spaces,
linear attention, recurrences) cannot compute a tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import AttentionInterface

from moslim.ops.length_bucketing import token_positions
from moslim.ops.numerics import at_least_float32
from moslim.ops.transformers_compat import attention_replaced, is_stateful, sdpa_attention_forward
from moslim.training.distributed import inform

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_MASKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def carries_state(model: Any) -> bool:
    """Whether some layers of a model do not attend but carry a state; it must be without an adapter's wrapper."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return is_stateful(model) or not _ATTENTION.issuperset(kinds)


@cache
def say_once(message: str) -> None:
    """Tells something that concerns every model of a kind, such as a policy and its reference."""
    inform(message)


def agreement(model: Any) -> float:
    """Greatest difference of two computations of the same logits that counts as rounding, relative to the largest."""
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 0.1


@torch.no_grad()
def masks_left_padding(model: Any) -> bool:
    """Whether padding before a text leaves what a causal language model computes of it as it is.

    Attention masks it; a state that runs through it need not. A model that carries a state is tried once.

    Args:
        model: Without an adapter, in the Hugging Face form.
    """
    if not carries_state(model):
        return True
    if model not in _MASKS:
        _MASKS[model] = _unmoved_by_padding(model)
        if not _MASKS[model]:
            say_once(f"{model.config.model_type}: padding before a text changes its states: none is put there.")
    return _MASKS[model]


def _unmoved_by_padding(model: Any) -> bool:
    ids = made_up_tokens(model, 2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.autocast(model.device.type, enabled=False):
        alone = model(input_ids=ids[1:, 3:], use_cache=False)[0][0, -1]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": token_positions(mask)}
        padded = model(**inputs, use_cache=False)[0][1, -1]
    return bool((padded - alone).abs().max() <= agreement(model) * alone.abs().max())


def made_up_tokens(model: Any, rows: int, length: int) -> torch.Tensor:
    """``[rows, length]`` different small ids, none of them 0, which is often padding and embedded as nothing."""
    most = len(model.get_input_embeddings().weight)
    return (torch.arange(rows * length, device=model.device) % max(1, most - 1) + 1).clamp(max=most - 1).view(rows, -1)


_HELD = 8
"""Most tokens of all sequences of a part, per node that the part may have: attention reads every sequence whole."""


@dataclass
class Tree:
    """The ``U`` different prefixes (nodes) of ``N`` sequences of up to ``L`` tokens.

    Args:
        tokens: ``[U]`` last token of each prefix.
        positions: ``[U]`` position of that token, from 0.
        nodes: ``[N, L]`` node of every token of the sequences; 0 behind their end.
        paths: ``[R, L]`` rows of ``nodes`` that together contain all nodes, without rows that are part of others.
        cells: ``[U]`` index of each node in the flattened ``paths``.
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
        order: ``[N]`` index of each sequence in the input.
        new: ``[N, L]`` bool, tokens up to which a sequence differs from all before it: one for each node of their tree.
    """

    tokens: Tensor
    lengths: Tensor
    order: Tensor
    new: Tensor

    def parts(self, tokens: int) -> Iterator[Sequences]:
        """Cuts the sequences into parts whose trees have at most ``tokens`` nodes.

        A part has at least one sequence. Several sequences of one part have together at most eight times as many
        tokens, padding included.
        """
        new_nodes, lengths = self.new.sum(dim=1).tolist(), self.lengths.tolist()
        start, nodes, widest = 0, 0, 0
        for end, length in enumerate(lengths):
            nodes, widest = nodes + new_nodes[end], max(widest, length)
            if end > start and (nodes > tokens or (end + 1 - start) * widest > _HELD * tokens):
                yield self._part(start, end)
                start, nodes, widest = end, length, length
        if lengths:
            yield self._part(start, len(lengths))

    def tree(self) -> Tree:
        """Tree of the sequences; the rows of ``nodes`` are in alphabetical order."""
        number = torch.full_like(self.tokens, -1)
        number[self.new] = torch.arange(int(self.new.sum()), device=number.device)
        nodes = number.cummax(dim=0).values.masked_fill(~_inside(self.tokens, self.lengths), 0)
        has_new = self.new.any(dim=1)
        return Tree(
            tokens=self.tokens[self.new],
            positions=self.new.nonzero()[:, 1],
            nodes=nodes,
            paths=nodes[has_new],
            cells=self.new[has_new].flatten().nonzero()[:, 0],
        )

    def _part(self, start: int, end: int) -> Sequences:
        lengths = self.lengths[start:end]
        width = int(lengths.max())
        tokens, new = self.tokens[start:end, :width], self.new[start:end, :width].clone()
        new[:1] = _inside(tokens[:1], lengths[:1])  # nothing is before it any more
        return Sequences(tokens, lengths, self.order[start:end], new)


def in_order(tokens: Tensor, lengths: Tensor) -> Sequences:
    """Sorts sequences so that those with a common prefix are neighbours.

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
    sequences = in_order(tokens, lengths)
    tree = sequences.tree()
    return replace(tree, nodes=tree.nodes[sequences.order.argsort()])


def _inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


_NAME = "moslim_tree"
_FOREIGN = ("softcap", "s_aux", "position_bias")
"""Attention arguments of some architectures that are not supported here."""
_KINDS = {"full_attention", "sliding_attention"}
_NO_MASK = (1, 1, 1, 1)
_READS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class _Reading:
    """A forward pass over a tree.

    Args:
        tree: The tree.
        windows: How far back layers were told to look.
    """

    tree: Tree
    windows: set[int | None] = field(default_factory=set)


_READING: ContextVar[_Reading] = ContextVar(_NAME)


class _Laid(torch.autograd.Function):
    """Rows ``[U, W]`` where they stand on paths. Gradients that meet in a row are added up in float32 or finer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.count, gradient.shape[1], dtype=at_least_float32(gradient.dtype))
        return total.index_add_(0, places, gradient.to(total.dtype)).to(gradient.dtype), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ``[1, heads, U, width]`` of nodes, which are laid out path by path.

    Raises:
        NotImplementedError: The architecture's attention is of another kind.
    """
    if attention_mask is None or attention_mask.shape != _NO_MASK or any(others.get(n) is not None for n in _FOREIGN):
        raise NotImplementedError
    reading = _READING.get()
    reading.windows.add(sliding_window)
    paths = reading.tree.paths
    length = paths.shape[1]

    def along_paths(states: Tensor) -> Tensor:
        nodes = states[0].transpose(0, 1)
        rows: Tensor = _Laid.apply(nodes.flatten(1), paths.flatten())
        return rows.view(*paths.shape, *nodes.shape[1:]).transpose(1, 2)

    band = None
    if sliding_window is not None and length > sliding_window:
        behind = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        band = ((behind >= 0) & (behind < sliding_window))[None, None]
    queries, keys, values = map(along_paths, (query, key, value))
    causal = band is None
    outputs, _ = sdpa_attention_forward(module, queries, keys, values, band, dropout, scaling, is_causal=causal)
    return outputs.flatten(0, 1).index_select(0, reading.tree.cells)[None], None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def along(backbone: Any, tree: Tree) -> Iterator[dict[str, Any]]:
    """Context in which a transformer computes a tree; yields the arguments of its forward pass.

    The outputs have the shape ``[1, U, ...]``. Gradients flow, but gradient checkpointing is not supported.

    Args:
        backbone: Transformer that :func:`reads_trees` accepts.
        tree: The tree.
    """
    with _reading(backbone, tree):
        yield _inputs(tree)


@contextmanager
def _reading(backbone: Any, tree: Tree) -> Iterator[_Reading]:
    reading = _Reading(tree)
    token = _READING.set(reading)
    try:
        with attention_replaced(backbone.config.get_text_config(), _NAME):
            yield reading
    finally:
        _READING.reset(token)


def _inputs(tree: Tree) -> dict[str, Any]:
    # A mask of four axes is passed on as it is; none at all would be made.
    mask = torch.zeros(_NO_MASK, device=tree.tokens.device)
    nodes = {"input_ids": tree.tokens[None], "position_ids": tree.positions[None]}
    return {**nodes, "attention_mask": mask, "use_cache": False}


def reads_trees(backbone: Any, device: torch.device) -> bool:
    """Whether a transformer computes the same hidden states on a tree as on each sequence.

    False under gradient checkpointing. Otherwise each model is tested once on a small tree.

    Args:
        backbone: Transformer without its last layer, in the Hugging Face form.
        device: Device of the transformer.
    """
    if backbone.training and any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return False
    if backbone not in _READS:
        _READS[backbone] = _agrees(backbone, device)
        if not _READS[backbone]:
            rank_zero_info(
                f"{backbone.config.model_type}: its layers cannot read trees: texts that begin alike are computed "
                "apart, and sampling makes masks anew for every token."
            )
    return _READS[backbone]


@torch.no_grad()
def _agrees(backbone: Any, device: torch.device) -> bool:
    config = backbone.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if backbone.config.is_encoder_decoder or carries_state(backbone) or not _KINDS.issuperset(kinds):
        return False
    tokens = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 1]], device=device)
    tree = grow(tokens, torch.full((3,), 3, device=device))
    with torch.autocast(device.type, enabled=False):
        whole = backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
        try:
            with _reading(backbone, tree) as reading:
                nodes = backbone(**_inputs(tree)).last_hidden_state[0]
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
    # Three tokens are too few to see a window: a layer must have been told of it.
    if getattr(config, "sliding_window", None) and "sliding_attention" in kinds and reading.windows <= {None}:
        return False
    if nodes.shape != (len(tree.tokens), whole.shape[-1]):
        return False
    least = 1e-4 if torch.finfo(backbone.dtype).eps < 1e-6 else 3e-2
    return bool((nodes[tree.nodes] - whole).abs().max() <= least * whole.abs().max())
