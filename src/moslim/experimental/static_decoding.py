"""Decoding with a key-value cache of fixed size, optionally compiled.

Missing measurement: a rollout on a GPU, where the compiled step becomes a CUDA graph. On a CPU it takes longer than the
growing cache (``benchmarks/rollouts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from moslim.errors import UsageError
from moslim.policy.engines import Decoding, TorchEngine
from moslim.policy.engines.continuation import Continuation, Prompts
from moslim.policy.engines.decoding import continues

_ROUND = 64
"""The cache's length is a multiple of this, so that it is the same for most batches, whatever their longest prompt."""


class StaticTorchEngine(TorchEngine):
    """Samples like :class:`TorchEngine`, with a cache of fixed size that no answer leaves before all have ended.

    It gives the same answers. All layers of the model must attend to everything.

    Args:
        max_new_tokens: See :class:`TorchEngine`, as for the arguments up to ``decoding``.
        temperature: Sampling temperature.
        stop_strings: Texts that end an answer.
        stop_ids: Tokens that end an answer, besides the model's own.
        top_k: Draw among this many of the most likely tokens only.
        top_p: Draw among the most likely tokens that together have this probability.
        decoding: How answers are computed; ``cache``, ``merge`` and ``drop_finished`` do not apply.
        compiled: Compile the step from token to token, on CUDA into a graph. Compiling takes from seconds to minutes
            and is done again for other numbers of answers or much longer prompts. No last layer is packed then.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        top_k: int | None = None,
        top_p: float = 1.0,
        decoding: Decoding | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(max_new_tokens, temperature, stop_strings, stop_ids, top_k, top_p, decoding)
        self.compiled = compiled
        if compiled:  # a graph holds addresses of weights
            self.decoding = replace(self.decoding, pack_head=False)

    def _begin(self, model: Any, input_ids: Tensor, attention_mask: Tensor, samples: int) -> Continuation:
        if not continues(model):
            raise UsageError(
                f"StaticTorchEngine: this model ({model.config.model_type}) cannot go on from a cache: take TorchEngine"
            )
        prompts = Prompts(model, input_ids, attention_mask, samples)
        return _Fixed(prompts, self.max_new_tokens, self.decoding.share_prompts, self.compiled)


class _Fixed(Continuation):
    """With tensors of one size, in one place, from the first token to the last, as graphs of computation need them."""

    def __init__(self, prompts: Prompts, room: int, share_prompts: bool, compiled: bool) -> None:
        width = prompts.input_ids.shape[1]
        length = -(-(width + room) // _ROUND) * _ROUND
        filled = StaticCache(prompts.model.config, length)
        if any(type(layer) is not StaticLayer for layer in filled.layers):
            kind = prompts.model.config.model_type
            raise UsageError(
                f"StaticTorchEngine: not all layers of this model ({kind}) attend to everything: take TorchEngine"
            )
        self.logits = prompts.computed(filled, share_prompts)
        if share_prompts:
            self.logits = prompts.repeated(self.logits)
        total = len(self.logits)
        self._step, cache = _static(prompts.model, total, length, compiled)
        for layer, source in zip(cast(list[Any], cache.layers), cast(list[Any], filled.layers), strict=True):
            parts = (source.keys, source.values)
            keys, values = map(prompts.repeated, parts) if share_prompts else parts
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
