"""Answers in progress: what every way to compute them has in common, and the one that needs no cache."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moslim.loading import unwrapped
from moslim.packing import token_positions


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
    """What every way of sampling begins with; see :func:`~moslim.policy.engines.decoding.begin`."""

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
