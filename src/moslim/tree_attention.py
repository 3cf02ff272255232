"""Attention along the paths of a tree: a model computes every node once, and each token sees its own beginning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moslim.tree import Tree, grow

_NAME = "moslim_tree"
_TREE: ContextVar[Tree] = ContextVar(_NAME)
_FOREIGN = ("softcap", "s_aux", "position_bias")
"""What some architectures add to attention, and this does not know."""
_KINDS = {"full_attention", "sliding_attention"}
_READS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
    """Transformers' attention interface: ``[1, heads, U, width]`` of nodes, which are laid out path by path."""
    if any(others.get(name) is not None for name in _FOREIGN):
        raise NotImplementedError
    tree = _TREE.get()
    paths = tree.nodes[tree.rows]
    length = paths.shape[1]

    def along_paths(states: Tensor) -> Tensor:
        nodes = states[0].transpose(0, 1)
        rows = nodes.flatten(1).index_select(0, paths.flatten())
        return rows.view(*paths.shape, *nodes.shape[1:]).transpose(1, 2)

    band = None
    if sliding_window is not None and length > sliding_window:
        behind = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        band = ((behind >= 0) & (behind < sliding_window))[None, None]
    queries, keys, values = map(along_paths, (query, key, value))
    causal = band is None
    found, _ = sdpa_attention_forward(module, queries, keys, values, band, dropout, scaling, is_causal=causal)
    return found.flatten(0, 1).index_select(0, tree.cells)[None], None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def along(trunk: Any, tree: Tree) -> Iterator[dict[str, Any]]:
    """Lets a transformer read a tree; gives the arguments of its forward pass.

    What it computes is ``[1, U, ...]``. Gradients flow, but activations cannot be computed a second time.

    Args:
        trunk: A transformer that :func:`reads_trees`.
        tree: What it is given.
    """
    config, token = trunk.config, _TREE.set(tree)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield {
            "input_ids": tree.tokens[None],
            "position_ids": tree.positions[None],
            # four axes: taken as it is, so that none is made; it is not read
            "attention_mask": torch.zeros(1, 1, 1, 1, device=tree.tokens.device),
            "use_cache": False,
        }
    finally:
        config._attn_implementation = before
        _TREE.reset(token)


def reads_trees(trunk: Any, device: torch.device) -> bool:
    """Whether a transformer gives the same states on a tree as on each sequence.

    Not while activations are computed twice. Besides, it is tried once: that says more than any list of architectures.

    Args:
        trunk: A transformer without its last layer, in the Hugging Face form.
        device: Where it is.
    """
    if trunk.training and any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules()):
        return False
    if trunk not in _READS:
        kinds = getattr(trunk.config, "layer_types", None) or []
        _READS[trunk] = not trunk.config.is_encoder_decoder and _KINDS.issuperset(kinds) and _agrees(trunk, device)
    return _READS[trunk]


@torch.no_grad()
def _agrees(trunk: Any, device: torch.device) -> bool:
    tokens = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 2, 0]], device=device)
    tree = grow(tokens, torch.full((3,), 3, device=device))
    with torch.autocast(device.type, enabled=False):
        try:
            whole = trunk(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
            with along(trunk, tree) as inputs:
                nodes = trunk(**inputs).last_hidden_state[0]
        except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError, KeyError):
            return False
    least = 1e-4 if torch.finfo(whole.dtype).eps < 1e-6 else 3e-2
    if nodes.shape != (len(tree.tokens), whole.shape[-1]):
        return False
    return bool((nodes[tree.nodes] - whole).abs().max() <= least * whole.abs().max())
