"""The default engine: a short loop over the Hugging Face model.

Faster than ``generate`` in four places: each prompt is prefilled once and its cache repeated for its samples, the cache
grows in place, tokens are drawn by inverse CDF (``torch.multinomial`` is slow on CPU), and finished answers leave at
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moslim.noise import uniforms
from moslim.policy.engines.base import Completions, RolloutEngine
from moslim.policy.engines.cache import growing_cache
from moslim.precision import at_least_float32, widened


def draw(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: ``[B, V]``.
        temperature: 0 takes the most likely token, whose log-probability is then that at temperature 1.
        noise: ``[B]`` uniform in ``[0, 1)``.

    Returns:
        Tokens ``[B]`` and their log-probabilities ``[B]``.
    """
    logits = widened(logits)
    if temperature not in (0, 1):
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    else:
        cumulative = logprobs.exp().cumsum(dim=-1)
        threshold = (1 - noise)[:, None] * cumulative[:, -1:]  # in (0, total]: impossible tokens are never drawn
        tokens = torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


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
    """

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
        samples = seeds.shape[1]
        total, device = seeds.numel(), input_ids.device
        noise = uniforms(seeds.flatten(), self.max_new_tokens)
        eos = torch.tensor(eos_ids, device=device)
        tokens = torch.full((total, self.max_new_tokens), pad_id, dtype=torch.long, device=device)
        lengths = torch.zeros(total, dtype=torch.long, device=device)
        ended = torch.zeros(total, dtype=torch.bool, device=device)

        cache = growing_cache(model.config, self.max_new_tokens)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        prefill = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(samples)
        logits = prefill.logits[:, -1].repeat_interleave(samples, dim=0)
        logprobs = torch.zeros(tokens.shape, dtype=at_least_float32(logits.dtype), device=device)
        attention = attention_mask.repeat_interleave(samples, dim=0)
        position = positions[:, -1:].repeat_interleave(samples, dim=0)
        padded = not bool(attention_mask.all())
        rows = torch.arange(total, device=device)  # where each row of the shrinking batch belongs

        for step in range(self.max_new_tokens):
            drawn, logprob = draw(logits, self.temperature, noise[rows, step])
            tokens[rows, step], logprobs[rows, step] = drawn, logprob
            lengths[rows] = step + 1
            finished = torch.isin(drawn, eos)
            if self.stop_strings:
                finished |= self._stopped(tokens[rows, : step + 1])
            if finished.any():
                ended[rows[finished]] = True
                keep = survivors(finished)
                if not len(keep):
                    break
                cache.batch_select_indices(keep)
                rows, drawn, position, attention = rows[keep], drawn[keep], position[keep], attention[keep]
            if step == self.max_new_tokens - 1:
                break
            position = position + 1
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
            logits = model(
                input_ids=drawn[:, None],
                attention_mask=attention if padded else None,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

        longest = int(lengths.max())
        mask = torch.arange(longest, device=device) < lengths[:, None]
        return Completions(tokens[:, :longest], mask, logprobs[:, :longest], ended)

    def _stopped(self, tokens: Tensor) -> Tensor:
        """``[B]`` bool: the end of the answers ``[B, t]`` so far holds a stop string."""
        if self.tokenizer is None:
            raise RuntimeError("an engine with stop_strings needs a tokenizer: call engine.bind(tokenizer) first")
        longest = max(map(len, self.stop_strings)) + 1  # tokens are rarely empty, so no more can be part of one
        texts = self.tokenizer.batch_decode(tokens[:, -longest:])
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=tokens.device)
