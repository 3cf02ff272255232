"""A key-value cache that grows in place."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values with room for more; transformers' own copies everything for every token.

    Args:
        room: Tokens to make room for when the storage is made anew: at the first token after a prefill, and after
            rows were repeated or dropped.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``[B, heads, t, width]`` keys and values and returns all of them."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        length = keys.shape[-2]
        end = length + key_states.shape[-2]
        if self._storage is None or self._storage[0].data_ptr() != keys.data_ptr() or end > self._storage[0].shape[-2]:
            self._storage = self._enlarged(keys, end - length), self._enlarged(values, end - length)
        for storage, new in zip(self._storage, (key_states, value_states), strict=True):
            storage[:, :, length:end] = new
        self.keys, self.values = self._storage[0][:, :, :end], self._storage[1][:, :, :end]
        return self.keys, self.values

    def _enlarged(self, old: Tensor, new_tokens: int) -> Tensor:
        batch, heads, length, width = old.shape
        storage = old.new_empty(batch, heads, length + max(self._room, new_tokens), width)
        storage[:, :, :length] = old
        return storage


def growing_cache(config: PreTrainedConfig, room: int) -> DynamicCache:
    """A cache for a model; layers of a kind other than full attention stay transformers' own.

    Args:
        config: The model's.
        room: Most tokens that will be generated.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
