"""A key-value cache that grows and loses rows in place."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values with room for more; transformers' own copies everything for every token.

    Args:
        room: Tokens to make room for when the storage is made anew: when rows are repeated after a prefill, and when
            the room is used up.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``[B, heads, t, width]`` keys and values and returns all of them."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        length = cast(Tensor, self.keys).shape[-2]
        end = length + key_states.shape[-2]
        if not self._in_place() or end > self._stored()[0].shape[-2]:
            self._store(repeats=1, room=max(self._room, end - length))
        for storage, new in zip(self._stored(), (key_states, value_states), strict=True):
            storage[:, :, length:end] = new
        self._show(end)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, with room for what is to come."""
        if self.get_seq_length() > 0:
            self._store(repeats, self._room)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``, in that order; only rows that change their place are copied."""
        if self.get_seq_length() == 0 or not self._in_place():
            super().batch_select_indices(indices)
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        length = self.get_seq_length()
        for storage in self._stored():
            storage[moved, :, :length] = storage[indices[moved], :, :length]
        self._storage = cast(Any, tuple(storage[: len(indices)] for storage in self._stored()))
        self._show(length)

    def _in_place(self) -> bool:
        """Whether keys and values still lie in the storage; methods of the base class may have replaced them."""
        return self._storage is not None and self._storage[0].data_ptr() == cast(Tensor, self.keys).data_ptr()

    def _stored(self) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self._storage)

    def _store(self, repeats: int, room: int) -> None:
        stored = []
        for old in (cast(Tensor, self.keys), cast(Tensor, self.values)):
            batch, heads, length, width = old.shape
            storage = old.new_empty(batch * repeats, heads, length + room, width)
            storage.view(batch, repeats, heads, length + room, width)[..., :length, :] = old[:, None]
            stored.append(storage)
        self._storage = (stored[0], stored[1])
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (storage[:, :, :length] for storage in self._stored())


def growing_cache(config: PreTrainedConfig, room: int) -> DynamicCache:
    """A cache for a model; layers of a kind other than full attention stay transformers' own.

    Args:
        config: The model's.
        room: Most tokens that will be generated.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
