"""From logits to tokens: how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.precision import widened

DrawMethod = Literal["inverse_cdf", "multinomial"]


@dataclass
class Chosen:
    """One token for each of ``B`` rows; any, with a log-probability of NaN, where the logits are not finite.

    Args:
        tokens: ``[B]`` int64.
        logprobs: ``[B]`` float32 or finer, under the tempered distribution.
        sampler_logprobs: ``[B]`` the same, under what is left of it by top-k and top-p; None where nothing was cut.
    """

    tokens: Tensor
    logprobs: Tensor
    sampler_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenChoice:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the most likely token, whose log-probability is then that at temperature 1.
        top_k: Draw among this many of the most likely tokens; None = among all.
        top_p: Draw among the most likely tokens that together have this probability; 1 = among all.
        method: ``inverse_cdf`` takes one uniform number per row. ``multinomial`` is torch's own: slow on a CPU, and
            what is drawn for a row depends on the rows beside it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    method: DrawMethod = "inverse_cdf"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"engine.temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"engine.top_k is {self.top_k}: give 1 or more, or null for no limit")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"engine.top_p is {self.top_p}: give a number above 0, at most 1")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)

    def __call__(self, logits: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Chosen:
        """Chooses one token per row.

        Args:
            logits: ``[B, V]``.
            noise: ``[B]`` uniform in ``[0, 1)``.
            generator: What ``multinomial`` draws from.
        """
        logits = widened(logits)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        left = cut(logprobs, self.top_k, self.top_p) if self.cuts else logprobs
        if self.temperature == 0:
            tokens = left.argmax(dim=-1)
        elif self.method == "multinomial":
            broken = logprobs[:, :1].isnan()  # all of a row, or none of it: any token is drawn, the caller sees the NaN
            tokens = torch.multinomial(left.exp().masked_fill(broken, 1.0), 1, generator=generator)[:, 0]
        else:
            tokens = inverse_cdf(left.exp(), noise)
        found = Chosen(tokens, logprobs.gather(-1, tokens[:, None])[:, 0])
        if self.cuts:
            found.sampler_logprobs = left.gather(-1, tokens[:, None])[:, 0]
        return found


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draws one token per row ``[B]`` where the cumulative distribution reaches a random height.

    Args:
        probabilities: ``[B, V]``, up to a factor per row.
        noise: ``[B]`` uniform in ``[0, 1)``.
    """
    cumulative = probabilities.cumsum(dim=-1)
    threshold = (1 - noise)[:, None] * cumulative[:, -1:]  # in (0, total]: impossible tokens are never drawn
    return torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def cut(logprobs: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Leaves the most likely tokens, first by number, then by probability, as ``generate`` does.

    Args:
        logprobs: ``[B, V]``.
        top_k: How many; tokens as likely as the last of them stay, too. None = all.
        top_p: The fewest that together have this probability.

    Returns:
        ``[B, V]`` log-probabilities that add up to one again, ``-inf`` on what was cut.
    """
    if top_k is not None and top_k < logprobs.shape[-1]:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # probability of all that are likelier
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs
