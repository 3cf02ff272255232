"""Attention along the paths of a tree: a model computes every node once, and each token sees its own beginning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import AttentionInterface

from moslim.ops.transformers_compat import attention_replaced, sdpa_attention_forward
from moslim.precision import at_least_float32
from moslim.recurrence import carries_state
from moslim.tree import Tree, grow

_NAME = "moslim_tree"
_FOREIGN = ("softcap", "s_aux", "position_bias")
"""What some architectures add to attention, and this does not know."""
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
    found, _ = sdpa_attention_forward(module, queries, keys, values, band, dropout, scaling, is_causal=causal)
    return found.flatten(0, 1).index_select(0, reading.tree.cells)[None], None


AttentionInterface.register(_NAME, _attend)


@contextmanager
def along(trunk: Any, tree: Tree) -> Iterator[dict[str, Any]]:
    """Lets a transformer read a tree; gives the arguments of its forward pass.

    What it computes is ``[1, U, ...]``. Gradients flow, but activations cannot be computed a second time.

    Args:
        trunk: A transformer that :func:`reads_trees`.
        tree: What it is given.
    """
    with _reading(trunk, tree):
        yield _inputs(tree)


@contextmanager
def _reading(trunk: Any, tree: Tree) -> Iterator[_Reading]:
    reading = _Reading(tree)
    token = _READING.set(reading)
    try:
        with attention_replaced(trunk.config.get_text_config(), _NAME):
            yield reading
    finally:
        _READING.reset(token)


def _inputs(tree: Tree) -> dict[str, Any]:
    # A mask of four axes is passed on as it is; none at all would be made.
    mask = torch.zeros(_NO_MASK, device=tree.tokens.device)
    nodes = {"input_ids": tree.tokens[None], "position_ids": tree.positions[None]}
    return {**nodes, "attention_mask": mask, "use_cache": False}


def reads_trees(trunk: Any, device: torch.device) -> bool:
    """Whether a transformer gives the same states on a tree as on each sequence.

    Not while activations are computed twice. Besides, it is tried once.

    Args:
        trunk: A transformer without its last layer, in the Hugging Face form.
        device: Where it is.
    """
    if trunk.training and any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules()):
        return False
    if trunk not in _READS:
        _READS[trunk] = _agrees(trunk, device)
        if not _READS[trunk]:
            kind = trunk.config.model_type
            rank_zero_info(
                f"{kind}: its layers cannot read trees: texts that begin alike are computed apart, and sampling makes "
                "masks anew for every token."
            )
    return _READS[trunk]


@torch.no_grad()
def _agrees(trunk: Any, device: torch.device) -> bool:
    config = trunk.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if trunk.config.is_encoder_decoder or carries_state(trunk) or not _KINDS.issuperset(kinds):
        return False
    tokens = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 1]], device=device)
    tree = grow(tokens, torch.full((3,), 3, device=device))
    with torch.autocast(device.type, enabled=False):
        whole = trunk(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
        try:
            with _reading(trunk, tree) as reading:
                nodes = trunk(**_inputs(tree)).last_hidden_state[0]
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
    # Three tokens are too few to see a window: a layer must have been told of it.
    if getattr(config, "sliding_window", None) and "sliding_attention" in kinds and reading.windows <= {None}:
        return False
    if nodes.shape != (len(tree.tokens), whole.shape[-1]):
        return False
    least = 1e-4 if torch.finfo(trunk.dtype).eps < 1e-6 else 3e-2
    return bool((nodes[tree.nodes] - whole).abs().max() <= least * whole.abs().max())
