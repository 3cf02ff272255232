"""The model's side of sampling: answers in progress, which are given tokens and say what may follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from moslim.packing import token_positions
from moslim.policy.engines.cache import growing_cache
from moslim.policy.engines.choice import DrawMethod

CacheKind = Literal["growing", "dynamic", "static"]
_ROUND = 64
"""A static cache's length is a multiple of this: of one length for most batches, whatever their longest prompt."""


@dataclass(frozen=True)
class Decoding:
    """How :class:`TorchEngine` computes answers. All ways give the same answers, but for ``draw: multinomial``.

    Args:
        share_prompts: Compute each prompt once, and repeat its keys and values for its answers.
        drop_finished: Let an answer leave the batch as soon as it ends.
        cache: ``growing`` keeps keys and values where there is room for more; ``dynamic`` is transformers' own, which
            copies them all for every token; ``static`` has one size from the start, and nothing leaves it.
        compiled: Compile the step from token to token, on CUDA into a graph; needs ``cache: static``. Compiling takes
            from seconds to minutes and is done again for other numbers of answers or much longer prompts.
        pack_head: On a CPU, copy a large last layer into the order in which few rows read it fastest.
        draw: ``inverse_cdf`` takes one random number per token, a function of its answer's seed and of nothing else;
            ``multinomial`` is torch's own: its draws repeat only if the whole batch does. None = the first, but on CUDA
            the second: cumulative sums, which the first needs, are not reproducible there.
        answers: Most answers that are sampled at once, those of one prompt together; more are sampled in turns, prompts
            of like length first. None = all.
    """

    share_prompts: bool = True
    drop_finished: bool = True
    cache: CacheKind = "growing"
    compiled: bool = False
    pack_head: bool = True
    draw: DrawMethod | None = None
    answers: int | None = None

    def __post_init__(self) -> None:
        if self.cache not in get_args(CacheKind):
            raise ValueError(f"engine.decoding.cache is '{self.cache}': give one of {', '.join(get_args(CacheKind))}")
        if self.draw not in (None, *get_args(DrawMethod)):
            raise ValueError(f"engine.decoding.draw is '{self.draw}': give one of {', '.join(get_args(DrawMethod))}")
        if self.compiled and self.cache != "static":
            raise ValueError(f"engine.decoding.compiled needs one size: set cache to static, not {self.cache}")
        if self.answers is not None and self.answers < 1:
            raise ValueError(f"engine.decoding.answers is {self.answers}: give 1 or more, or null for all at once")


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


def begin(
    model: Any, input_ids: Tensor, attention_mask: Tensor, samples: int, room: int, decoding: Decoding
) -> Continuation:
    """Computes prompts.

    Args:
        model: Causal language model in the Hugging Face form, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        samples: Answers to each prompt; those of one prompt are adjacent.
        room: Most tokens of an answer.
        decoding: How.
    """
    prompts = _Prompts(model, input_ids, attention_mask, samples)
    if decoding.cache == "static":
        return _Fixed(prompts, room, decoding)
    return _Flexible(prompts, room, decoding)


@dataclass
class _Prompts:
    """What both ways begin with; see :func:`begin`."""

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
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class _Flexible(Continuation):
    """With a cache that grows with every token, and from which answers can be dropped."""

    def __init__(self, prompts: _Prompts, room: int, decoding: Decoding) -> None:
        self._model, self._drop = prompts.model, decoding.drop_finished
        config = prompts.model.config
        growing = decoding.cache == "growing"
        self._cache = growing_cache(config, room) if growing else DynamicCache(config=config)
        self.logits = prompts.computed(self._cache, decoding.share_prompts)
        if decoding.share_prompts:
            self._cache.batch_repeat_interleave(prompts.samples)
            self.logits = prompts.repeated(self.logits)
        self._padded = not bool(prompts.attention_mask.all())
        self._attention = prompts.repeated(prompts.attention_mask)
        self._position = prompts.repeated(prompts.positions[:, -1:])
        self._places: Tensor | None = None  # of the answers that are still wanted, where others stay in the batch

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        if self._places is not None:
            tokens = tokens.new_zeros(len(self._position)).index_copy(0, self._places, tokens)
        self._position = self._position + 1
        self._attention = torch.cat([self._attention, self._attention.new_ones(len(tokens), 1)], dim=1)
        logits = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._attention if self._padded else None,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.logits = logits if self._places is None else logits[self._places]

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        if not self._drop:
            self._places = rows if self._places is None else self._places[rows]
            return
        self._cache.batch_select_indices(rows)
        self._attention, self._position = self._attention[rows], self._position[rows]


class _Fixed(Continuation):
    """With tensors of one size, in one place, from the first token to the last, as graphs of computation need them."""

    def __init__(self, prompts: _Prompts, room: int, decoding: Decoding) -> None:
        width = prompts.input_ids.shape[1]
        length = -(-(width + room) // _ROUND) * _ROUND
        filled = StaticCache(prompts.model.config, length)
        if any(type(layer) is not StaticLayer for layer in filled.layers):
            kind = prompts.model.config.model_type
            raise ValueError(
                f"engine.decoding.cache is 'static', but not all layers of this model ({kind}) attend to everything: "
                "set it to growing, and compiled to false"
            )
        self.logits = prompts.computed(filled, decoding.share_prompts)
        if decoding.share_prompts:
            self.logits = prompts.repeated(self.logits)
        total = len(self.logits)
        self._step, cache = _static(prompts.model, total, length, decoding.compiled)
        for layer, source in zip(cast(list[Any], cache.layers), cast(list[Any], filled.layers), strict=True):
            parts = (source.keys, source.values)
            keys, values = map(prompts.repeated, parts) if decoding.share_prompts else parts
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            layer.cumulative_length.copy_(source.cumulative_length)
        # What is not written yet is masked, since it comes later than the token that looks.
        self._attention = prompts.attention_mask.new_ones(total, length)
        self._attention[:, :width] = prompts.repeated(prompts.attention_mask)
        self._position = prompts.repeated(prompts.positions[:, -1:])
        self._places = torch.arange(total, device=self._position.device)

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        every = tokens.new_zeros(len(self._position), 1)
        every[self._places, 0] = tokens
        self._position += 1
        self.logits = self._step(every, self._attention, self._position)[self._places]

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        self._places = self._places[rows]


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
_COMPILED: WeakKeyDictionary[nn.Module, dict[tuple[int, int], tuple[Step, StaticCache]]] = WeakKeyDictionary()
"""A graph has addresses in it, so that step and cache are kept together and used again, for each of the last shapes."""
_SHAPES = 4
"""Shapes that are kept: two lengths of prompts in training, and two in evaluation."""


def _static(model: Any, rows: int, length: int, compiled: bool) -> tuple[Step, StaticCache]:
    """A model's step from token to token, and the cache that it works on."""
    kept = _COMPILED.setdefault(model, {}) if compiled else {}
    if (rows, length) in kept:
        return kept[rows, length]
    cache, owner = StaticCache(model.config, length), ref(model)

    def step(tokens: Tensor, attention: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = cast(Any, owner())(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    if not compiled:
        return step, cache
    while len(kept) >= _SHAPES:
        kept.pop(next(iter(kept)))  # its keys and values take memory
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    kept[rows, length] = torch.compile(step, dynamic=False, mode=mode), cache
    return kept[rows, length]
