"""Default engine: a loop over the Hugging Face model in the training process.

It is faster than transformers' ``generate``: each prompt is computed once for all its completions, which share a row of
the cache until they differ; the cache and the masks grow in place; a large output layer is packed for few rows; tokens
are drawn by inverse CDF (``torch.multinomial`` is slow on a CPU); finished completions leave the batch at once; torch
runs in inference mode. ``Decoding`` switches each of these off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moslim.generation.base import Completions, RolloutEngine
from moslim.generation.decoding import Chosen, Decoding, TokenChoice, begin
from moslim.generation.kv_cache import Continuation
from moslim.ops.numerics import at_least_float32, derive_seed, uniforms
from moslim.ops.transformers_compat import can_pack_linear, packed_linear

_LARGE = 1 << 20
"""Smallest number of weights of a layer that is packed; a smaller layer fits into a CPU's cache."""


@contextmanager
def packed_head(model: Any, rows: int) -> Iterator[None]:
    """Context in which a model on a CPU uses a copy of its output layer in oneDNN's packed layout.

    The layout makes the product of few rows with ``[V, H]`` weights faster. The weights must not change meanwhile.

    Args:
        model: Causal language model in the Hugging Face form. An output layer that is not a float32 ``nn.Linear``
            without bias is not packed.
        rows: Number of rows to optimise for; other numbers work too.
    """
    head = model.get_output_embeddings()
    weight = head.weight if type(head) is nn.Linear and head.bias is None else None
    if type(weight) is not nn.Parameter or not _packs(weight):
        yield
        return
    head.forward = packed_linear(weight, rows)
    try:
        yield
    finally:
        del head.forward


def _packs(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    large = weight.dtype == torch.float32 and weight.numel() >= _LARGE
    return on_cpu and large and can_pack_linear()


def survivors(finished: Tensor) -> Tensor:
    """Orders the unfinished rows such that few of them move: rows from the end replace finished ones.

    Args:
        finished: ``[B]`` bool.

    Returns:
        ``[A]`` int64 row for each new place.
    """
    rows = torch.arange(int((~finished).sum()), device=finished.device)
    free = finished[: len(rows)].nonzero()[:, 0]
    rows[free] = len(rows) + (~finished[len(rows) :]).nonzero()[:, 0]
    return rows


class TorchEngine(RolloutEngine):
    """Engine that samples with the policy's own weights, in the training process.

    Args:
        max_new_tokens: Length limit of a completion, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token.
        stop_strings: Texts that end a completion, as end-of-sequence tokens do; its text excludes them.
        stop_ids: Tokens that end a completion, besides the model's own; its text excludes them.
        top_k: Number of most likely tokens to draw from; None = all. With ``top_k`` or ``top_p`` completions are
            off-policy, which training corrects for (:class:`~moslim.policy.OffPolicy`).
        top_p: Total probability of the most likely tokens to draw from; 1 = all.
        decoding: Options of decoding; None = the defaults.

    Raises:
        UsageError: An argument is out of range.
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
    ) -> None:
        super().__init__(max_new_tokens, temperature, stop_strings, stop_ids)
        self.top_k = top_k
        self.top_p = top_p
        self.decoding = decoding or Decoding()
        self._choice(torch.device("cpu"))  # validates the arguments

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: Tensor,
        eos_ids: list[int],
        pad_id: int,
    ) -> Completions:
        num_generations, device = seeds.shape[1], seeds.device
        dtype, choice = at_least_float32(model.dtype), self._choice(device)
        buffer = _Buffer(seeds.numel(), self.max_new_tokens, pad_id, choice.cuts, dtype, device)
        eos = torch.tensor(eos_ids, device=device)
        lengths = attention_mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        limit = self.decoding.completions
        prompts_at_once = len(order) if limit is None else max(1, limit // num_generations)
        everything = prompts_at_once >= len(order)
        parts = (torch.arange(len(order), device=device),) if everything else order.split(prompts_at_once)
        packing = packed_head(model, seeds.numel()) if self.decoding.pack_head else nullcontext()
        # The buffer is made outside of inference mode, so that its tensors can take part in a loss.
        with self.decoding.without_gradients(model), packing:
            for part in parts:
                positions = slice(input_ids.shape[1] - int(lengths[part].max()), None)
                rows = (part[:, None] * num_generations + torch.arange(num_generations, device=device)).flatten()
                prompts = input_ids[part, positions], attention_mask[part, positions]
                self._complete(model, *prompts, seeds[part], choice, buffer, rows, eos)
        return buffer.completions()

    def _complete(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: Tensor,
        choice: TokenChoice,
        buffer: _Buffer,
        rows: Tensor,
        eos: Tensor,
    ) -> None:
        """Samples completions into ``rows`` of the buffer."""
        noise = uniforms(seeds.flatten(), self.max_new_tokens)
        generator = None
        if choice.method == "multinomial":
            generator = torch.Generator(seeds.device).manual_seed(derive_seed(*seeds.flatten().tolist()))
        unfinished = torch.arange(len(rows), device=rows.device)
        continuation = self._begin(model, input_ids, attention_mask, seeds.shape[1])
        for step in range(self.max_new_tokens):
            chosen = choice(continuation.logits, noise[unfinished, step], generator)
            buffer.write(rows[unfinished], step, chosen)
            finished = torch.isin(chosen.tokens, eos)
            if self.stop_strings:
                finished |= self._stopped(buffer.tokens[rows[unfinished], : step + 1])
            tokens = chosen.tokens
            if finished.any():
                buffer.ended[rows[unfinished[finished]]] = True
                keep = survivors(finished)
                unfinished, tokens = unfinished[keep], tokens[keep]
                if not len(unfinished):
                    break
                continuation.keep(keep)
            if step < self.max_new_tokens - 1:
                continuation.feed(tokens)

    def _begin(self, model: Any, input_ids: Tensor, attention_mask: Tensor, num_generations: int) -> Continuation:
        """Computes the prompts; subclasses may return another kind of continuation."""
        return begin(model, input_ids, attention_mask, num_generations, self.max_new_tokens, self.decoding)

    @property
    def cuts(self) -> bool:
        """Whether ``top_k`` or ``top_p`` truncates the distribution."""
        return self._choice(torch.device("cpu")).cuts

    def _choice(self, device: torch.device) -> TokenChoice:
        method = self.decoding.draw or ("multinomial" if device.type == "cuda" else "inverse_cdf")
        return TokenChoice(self.temperature, self.top_k, self.top_p, method)

    def _stopped(self, tokens: Tensor) -> Tensor:
        """Marks completions ``[B, t]`` whose end holds a stop string: ``[B]`` bool."""
        if self.tokenizer is None:
            raise RuntimeError("an engine with stop_strings needs a tokenizer: call engine.bind(tokenizer) first")
        # A token has at least one byte, so that no earlier token can be part of a stop string.
        longest = max(len(stop.encode()) for stop in self.stop_strings) + 1
        texts = self.tokenizer.batch_decode(tokens[:, -longest:])
        stopped = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(stopped, device=tokens.device)


class _Buffer:
    """``N`` completions of up to ``T`` tokens while they are sampled."""

    def __init__(
        self, total: int, limit: int, pad_id: int, truncated: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens = torch.full((total, limit), pad_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros((total, limit), dtype=dtype, device=device)
        self.behavior_logprobs = torch.zeros_like(self.logprobs) if truncated else None
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.ended = torch.zeros(total, dtype=torch.bool, device=device)

    def write(self, rows: Tensor, step: int, chosen: Chosen) -> None:
        """Adds a token to the completions at ``rows``."""
        self.tokens[rows, step], self.logprobs[rows, step] = chosen.tokens, chosen.logprobs
        if self.behavior_logprobs is not None and chosen.behavior_logprobs is not None:
            self.behavior_logprobs[rows, step] = chosen.behavior_logprobs
        self.lengths[rows] = step + 1

    def completions(self) -> Completions:
        """Returns the completions, as wide as the longest."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        behavior_logprobs = None if self.behavior_logprobs is None else self.behavior_logprobs[:, :longest]
        tokens, logprobs = self.tokens[:, :longest], self.logprobs[:, :longest]
        return Completions(tokens, mask, logprobs, self.ended, behavior_logprobs)
