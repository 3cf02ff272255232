"""The default engine: a loop over the Hugging Face model.

The last layer of a language model, packed for the few rows of a sampling step.

The default engine: a short loop over the Hugging Face model.

Faster than ``generate`` in eight places: each prompt is computed once for its answers, which stay one row of the cache
until they differ; the cache grows in place, and masks with it; a large last layer is packed for few rows, tokens are
drawn by inverse CDF (``torch.multinomial`` is slow on a CPU), finished answers leave at once, and torch is in inference
mode. ``Decoding`` can switch each of them off.
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
from moslim.training.lightning_compat import can_pack_linear, packed_linear

_LARGE = 1 << 20
"""Weights from which on a copy pays. A smaller layer stays in a CPU's cache."""


@contextmanager
def packed_head(model: Any, rows: int) -> Iterator[None]:
    """Lets a model on a CPU read a copy of its last layer in oneDNN's packed order, as Inductor's frozen models do.

    Torch's own product of few rows with ``[V, H]`` weights is limited by how they lie in memory. The weights must not
    change meanwhile.

    Args:
        model: Causal language model in the Hugging Face form. Heads of a kind of their own, and other types of numbers
            than float32, are left alone.
        rows: How many rows to pack for; others work, too.
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
    """Places of the rows that go on, such that few rows move: those from the end fill the gaps.

    Args:
        finished: ``[B]`` bool.

    Returns:
        ``[A]`` int64: the row that is to stand at each place.
    """
    places = torch.arange(int((~finished).sum()), device=finished.device)
    gaps = finished[: len(places)].nonzero()[:, 0]
    places[gaps] = len(places) + (~finished[len(places) :]).nonzero()[:, 0]
    return places


class TorchEngine(RolloutEngine):
    """Samples with the policy's own weights, in this process.

    Args:
        max_new_tokens: Length limit of an answer, the end-of-sequence token included.
        temperature: Sampling temperature; 0 takes the most likely token.
        stop_strings: Texts that end an answer, as end-of-sequence tokens do; they are left out of its text.
        stop_ids: Tokens that end an answer, besides the model's own; they are left out of its text.
        top_k: Draw among this many of the most likely tokens only; None = among all. With this or ``top_p`` answers are
            not the policy's own, which training corrects for (:class:`~moslim.policy.OffPolicy`).
        top_p: Draw among the most likely tokens that together have this probability; 1 = among all.
        decoding: How answers are computed; None = every fast way.

    Raises:
        ValueError: An argument is out of range.
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
        self._choice(torch.device("cpu"))  # refuses what is out of range

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
        samples, device = seeds.shape[1], seeds.device
        dtype, choice = at_least_float32(model.dtype), self._choice(device)
        found = _Table(seeds.numel(), self.max_new_tokens, pad_id, choice.cuts, dtype, device)
        eos = torch.tensor(eos_ids, device=device)
        lengths = attention_mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        together = len(order) if self.decoding.answers is None else max(1, self.decoding.answers // samples)
        parts = (torch.arange(len(order), device=device),) if together >= len(order) else order.split(together)
        packing = packed_head(model, seeds.numel()) if self.decoding.pack_head else nullcontext()
        # The table was made outside: unlike what is made in inference mode, it can take part in a loss.
        with self.decoding.without_gradients(model), packing:
            for part in parts:
                columns = slice(input_ids.shape[1] - int(lengths[part].max()), None)
                rows = (part[:, None] * samples + torch.arange(samples, device=device)).flatten()
                prompts = input_ids[part, columns], attention_mask[part, columns]
                self._answer(model, *prompts, seeds[part], choice, found, rows, eos)
        return found.completions()

    def _answer(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        seeds: Tensor,
        choice: TokenChoice,
        found: _Table,
        rows: Tensor,
        eos: Tensor,
    ) -> None:
        """Samples the answers that belong into ``rows`` of the table."""
        noise = uniforms(seeds.flatten(), self.max_new_tokens)
        generator = None
        if choice.method == "multinomial":
            generator = torch.Generator(seeds.device).manual_seed(derive_seed(*seeds.flatten().tolist()))
        going = torch.arange(len(rows), device=rows.device)  # which of them are not finished
        answers = self._begin(model, input_ids, attention_mask, seeds.shape[1])
        for step in range(self.max_new_tokens):
            chosen = choice(answers.logits, noise[going, step], generator)
            found.write(rows[going], step, chosen)
            finished = torch.isin(chosen.tokens, eos)
            if self.stop_strings:
                finished |= self._stopped(found.tokens[rows[going], : step + 1])
            tokens = chosen.tokens
            if finished.any():
                found.ended[rows[going[finished]]] = True
                keep = survivors(finished)
                going, tokens = going[keep], tokens[keep]
                if not len(going):
                    break
                answers.keep(keep)
            if step < self.max_new_tokens - 1:
                answers.feed(tokens)

    def _begin(self, model: Any, input_ids: Tensor, attention_mask: Tensor, samples: int) -> Continuation:
        """Computes prompts; subclasses may go on from them in another way."""
        return begin(model, input_ids, attention_mask, samples, self.max_new_tokens, self.decoding)

    @property
    def cuts(self) -> bool:
        """Whether ``top_k`` or ``top_p`` leaves tokens out."""
        return self._choice(torch.device("cpu")).cuts

    def _choice(self, device: torch.device) -> TokenChoice:
        method = self.decoding.draw or ("multinomial" if device.type == "cuda" else "inverse_cdf")
        return TokenChoice(self.temperature, self.top_k, self.top_p, method)

    def _stopped(self, tokens: Tensor) -> Tensor:
        """``[B]`` bool: the end of the answers ``[B, t]`` so far holds a stop string."""
        if self.tokenizer is None:
            raise RuntimeError("an engine with stop_strings needs a tokenizer: call engine.bind(tokenizer) first")
        # Tokens of bytes are the shortest that are not empty, so that no more can be part of a stop string.
        longest = max(len(stop.encode()) for stop in self.stop_strings) + 1
        texts = self.tokenizer.batch_decode(tokens[:, -longest:])
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=tokens.device)


class _Table:
    """``N`` answers of up to ``T`` tokens, as far as they are known."""

    def __init__(
        self, total: int, limit: int, pad_id: int, cut: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens = torch.full((total, limit), pad_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros((total, limit), dtype=dtype, device=device)
        self.behavior_logprobs = torch.zeros_like(self.logprobs) if cut else None
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.ended = torch.zeros(total, dtype=torch.bool, device=device)

    def write(self, rows: Tensor, step: int, chosen: Chosen) -> None:
        """Adds a token to some answers."""
        self.tokens[rows, step], self.logprobs[rows, step] = chosen.tokens, chosen.logprobs
        if self.behavior_logprobs is not None and chosen.behavior_logprobs is not None:
            self.behavior_logprobs[rows, step] = chosen.behavior_logprobs
        self.lengths[rows] = step + 1

    def completions(self) -> Completions:
        """The answers, as wide as the longest."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        sampler = None if self.behavior_logprobs is None else self.behavior_logprobs[:, :longest]
        return Completions(self.tokens[:, :longest], mask, self.logprobs[:, :longest], self.ended, sampler)
