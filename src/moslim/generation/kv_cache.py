"""Key-value cache that grows and drops rows in place, and the interface of completions in progress."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from moslim.ops.length_bucketing import token_positions
from moslim.ops.loading import unwrapped


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with room for more; :class:`DynamicLayer` copies all of them for every token.

    Args:
        rows: Maximal number of rows; allocated when rows are selected for the first time.
        room: Number of tokens to allocate beyond those present, whenever the storage is made or full.
    """

    def __init__(self, rows: int, room: int) -> None:
        super().__init__()
        self._rows = rows
        self._room = room
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``[B, heads, t, width]`` and returns all of them."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        rows, _, length, _ = cast(Tensor, self.keys).shape
        end = length + key_states.shape[-2]
        if not self._in_place() or end > self._stored()[0].shape[-2]:
            self._store(torch.arange(rows, device=key_states.device), max(self._room, end - length))
        for storage, new in zip(self._stored(), (key_states, value_states), strict=True):
            storage[:rows, :, length:end] = new
        self._show(rows, end)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects the rows at ``indices``, in that order, with or without repeats.

        Only rows that change their place are copied.
        """
        self.select(indices, _moved(indices))

    def select(self, indices: Tensor, moved: Tensor) -> None:
        """Does the same when the places ``moved`` that get other rows are known."""
        length = self.get_seq_length()
        if length == 0:
            return
        if not self._in_place() or len(indices) > len(self._stored()[0]):
            self._store(indices, self._room)
            return
        for storage in self._stored():
            storage[moved, :, :length] = storage[indices[moved], :, :length]
        self._show(len(indices), length)

    def _in_place(self) -> bool:
        """Whether keys and values are views of the storage; methods of the base class may have replaced them."""
        return self._storage is not None and self._storage[0].data_ptr() == cast(Tensor, self.keys).data_ptr()

    def _stored(self) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self._storage)

    def _store(self, rows: Tensor, room: int) -> None:
        stored = []
        for old in (cast(Tensor, self.keys), cast(Tensor, self.values)):
            _, heads, length, width = old.shape
            storage = old.new_empty(max(len(rows), self._rows), heads, length + room, width)
            storage[: len(rows), :, :length] = old[rows]
            stored.append(storage)
        self._storage = (stored[0], stored[1])
        self._show(len(rows), length)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (storage[:rows, :, :length] for storage in self._stored())


class SelectingCache(DynamicCache):
    """Transformers' dynamic cache with selection of rows for all kinds of layers."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects the rows at ``indices``, in that order, with or without repeats."""
        for layer in self.layers:
            select_rows(layer, indices)


class GrowingCache(SelectingCache):
    """Cache whose full-attention layers are :class:`GrowingLayer`; other layers stay those of transformers.

    Args:
        config: Configuration of the model.
        rows: Maximal number of rows.
        room: Maximal number of generated tokens.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, room: int) -> None:
        super().__init__(config=config)
        self.layers = [GrowingLayer(rows, room) if type(layer) is DynamicLayer else layer for layer in self.layers]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects the rows at ``indices``; the GPU is synchronised once for all layers, to find the moved rows."""
        moved = _moved(indices)
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.select(indices, moved)
            else:
                select_rows(layer, indices)


def select_rows(layer: Any, indices: Tensor) -> None:
    """Selects rows of a layer of transformers' cache.

    ``batch_select_indices`` handles keys and values only; a layer with a recurrent state needs ``reorder_cache``.
    """
    if hasattr(layer, "recurrent_states") or not hasattr(layer, "batch_select_indices"):
        layer.reorder_cache(indices)
    else:
        layer.batch_select_indices(indices)


def _moved(indices: Tensor) -> Tensor:
    return (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]


class Continuation(ABC):
    """``A`` completions in progress.

    Attributes:
        logits: ``[A, V]`` logits of their next tokens.
    """

    logits: Tensor

    @abstractmethod
    def feed(self, tokens: Tensor) -> None:
        """Appends the next tokens ``[A]`` and updates ``logits``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Keeps the completions at ``rows`` only, in that order; ``logits`` stays as it is until the next ``feed``."""


@dataclass
class Prompts:
    """Prompts to complete; :func:`~moslim.generation.decoding.begin` describes the fields."""

    model: Any
    input_ids: Tensor
    attention_mask: Tensor
    num_generations: int

    @property
    def positions(self) -> Tensor:
        """``[B, P]`` position of each token, not counting padding."""
        return token_positions(self.attention_mask)

    def repeated(self, tensor: Tensor) -> Tensor:
        """Repeats the entries of a tensor with one per prompt: one per completion."""
        return tensor.repeat_interleave(self.num_generations, dim=0)

    def computed(self, cache: Cache, share: bool) -> Tensor:
        """Fills a cache with each prompt once (``share``) or once per completion; returns the last logits of each."""
        inputs = (self.input_ids, self.attention_mask, self.positions)
        ids, attention, positions = inputs if share else map(self.repeated, inputs)
        return self.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            **cached(self.model, cache),
            logits_to_keep=1,
        ).logits[:, -1]


def cache_argument(model: Any) -> str | None:
    """Name of the argument of ``model.forward`` that takes a cache: Mamba's has another name, and XLNet has none.

    Args:
        model: Model without the wrapper of an adapter.
    """
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def cached(model: Any, cache: Cache) -> dict[str, Any]:
    """Arguments that pass a cache to a model's forward."""
    return {cache_argument(unwrapped(model)) or "past_key_values": cache, "use_cache": True}


class Uncached(Continuation):
    """Continuation without a cache: each token takes a pass over the whole texts, batched by length."""

    def __init__(self, prompts: Prompts) -> None:
        self._model = prompts.model
        texts = [ids[mask.bool()] for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]
        self.logits = prompts.repeated(self._next_logits(texts))
        self._texts = [text for text in texts for _ in range(prompts.num_generations)]

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        self._texts = [torch.cat([text, token[None]]) for text, token in zip(self._texts, tokens, strict=True)]
        self.logits = self._next_logits(self._texts)

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        self._texts = [self._texts[row] for row in rows.tolist()]

    def _next_logits(self, texts: list[Tensor]) -> Tensor:
        """``[A, V]`` logits after each text."""
        lengths = torch.tensor([len(text) for text in texts])
        logits_of: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            indices = (lengths == length).nonzero()[:, 0].tolist()
            ids = torch.stack([texts[index] for index in indices])
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            logits_of |= dict(zip(indices, logits, strict=True))
        return torch.stack([logits_of[index] for index in range(len(texts))])
