"""A key-value cache that grows and loses rows in place, and completions in progress.

A key-value cache that grows and loses rows in place.

Answers in progress: what every way to compute them has in common, and the one that needs no cache.
"""

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
    """One layer's keys and values with room for more; transformers' own copies everything for every token.

    Args:
        rows: Most rows, for which there is room as soon as rows are chosen for the first time.
        room: Tokens to make room for when the storage is made, then and whenever the room is used up.
    """

    def __init__(self, rows: int, room: int) -> None:
        super().__init__()
        self._rows = rows
        self._room = room
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends ``[B, heads, t, width]`` keys and values and returns all of them."""
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
        """Goes on with the rows at ``indices``, in that order, some of them several times or never.

        Only rows that come to another place are copied.
        """
        self.go_on(indices, _moved(indices))

    def go_on(self, indices: Tensor, moved: Tensor) -> None:
        """The same, for places ``moved`` that are known to get other rows."""
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
        """Whether keys and values still lie in the storage; methods of the base class may have replaced them."""
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
    """Transformers' own cache for a model, of whose rows some can be chosen, whatever its layers keep of them."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with the rows at ``indices``, in that order, some of them several times or never."""
        for layer in self.layers:
            select_rows(layer, indices)


class GrowingCache(SelectingCache):
    """A cache for a model; layers of a kind other than full attention stay transformers' own.

    Args:
        config: The model's.
        rows: Most rows.
        room: Most tokens that will be generated.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, room: int) -> None:
        super().__init__(config=config)
        self.layers = [GrowingLayer(rows, room) if type(layer) is DynamicLayer else layer for layer in self.layers]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with the rows at ``indices``; which of them move, for which a GPU is waited for, is asked once."""
        moved = _moved(indices)
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.go_on(indices, moved)
            else:
                select_rows(layer, indices)


def select_rows(layer: Any, indices: Tensor) -> None:
    """Goes on with some rows of one of transformers' layers.

    ``batch_select_indices`` knows keys and values only; ``reorder_cache`` of a layer that carries a state knows all.
    """
    if hasattr(layer, "recurrent_states") or not hasattr(layer, "batch_select_indices"):
        layer.reorder_cache(indices)
    else:
        layer.batch_select_indices(indices)


def _moved(indices: Tensor) -> Tensor:
    return (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]


class Continuation(ABC):
    """``A`` answers in progress.

    Attributes:
        logits: ``[A, V]`` of their next tokens.
    """

    logits: Tensor

    @abstractmethod
    def feed(self, tokens: Tensor) -> None:
        """Takes the next tokens ``[A]``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the answers only: those at ``rows``, in that order. ``logits`` is not cut."""


@dataclass
class Prompts:
    """What every way of sampling begins with; see :func:`~moslim.generation.decoding.begin`."""

    model: Any
    input_ids: Tensor
    attention_mask: Tensor
    samples: int

    @property
    def positions(self) -> Tensor:
        """``[B, P]``."""
        return token_positions(self.attention_mask)

    def repeated(self, rows: Tensor) -> Tensor:
        """One row per answer."""
        return rows.repeat_interleave(self.samples, dim=0)

    def computed(self, cache: Cache, share: bool) -> Tensor:
        """Fills a cache with every prompt once, or else once for each answer; returns the last logits of each."""
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
    """The argument by which a model's forward takes a cache: Mamba's has another name, and XLNet's has none.

    Args:
        model: Without an adapter's wrapper.
    """
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def cached(model: Any, cache: Cache) -> dict[str, Any]:
    """Arguments by which a model's forward takes a cache."""
    return {cache_argument(unwrapped(model)) or "past_key_values": cache, "use_cache": True}


class Uncached(Continuation):
    """Without a cache: every token takes a pass over the whole texts, those of one length together, and no padding."""

    def __init__(self, prompts: Prompts) -> None:
        self._model = prompts.model
        pairs = zip(prompts.input_ids, prompts.attention_mask, strict=True)
        texts = [row[mask.bool()] for row, mask in pairs]
        self.logits = prompts.repeated(self._following(texts))
        self._texts = [text for text in texts for _ in range(prompts.samples)]

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        self._texts = [torch.cat([text, token[None]]) for text, token in zip(self._texts, tokens, strict=True)]
        self.logits = self._following(self._texts)

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        self._texts = [self._texts[row] for row in rows.tolist()]

    def _following(self, texts: list[Tensor]) -> Tensor:
        """``[A, V]`` logits after each text."""
        lengths = torch.tensor([len(text) for text in texts])
        found: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            index = (lengths == length).nonzero()[:, 0].tolist()
            ids = torch.stack([texts[row] for row in index])
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            found |= dict(zip(index, logits, strict=True))
        return torch.stack([found[row] for row in range(len(texts))])
