"""How log-probabilities of answers are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from moslim.errors import UsageError
from moslim.packing import SharePrefixes, pass_tokens


@dataclass(frozen=True)
class Passes:
    """How answers are put through policy, reference, critic and classifier. All ways give the same numbers.

    Args:
        tokens: Most tokens per forward pass, padding included; None = 1024 on a CPU, where small passes stay in the
            cache, else 32768. Attention reads shared beginnings answer by answer: up to eight times as many.
        share_prefixes: Compute what answers begin with once: their prompt, and the words that they have in common;
            ``auto`` does where enough tokens are saved. Architectures that cannot compute every answer whole.
        chunked_logprobs: Never hold the logits of all tokens; where the architecture forbids that, they are held.
    """

    tokens: int | None = None
    share_prefixes: SharePrefixes = "auto"
    chunked_logprobs: bool = True

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"passes.tokens is {self.tokens}: give 1 or more")
        if self.share_prefixes not in get_args(SharePrefixes):
            raise UsageError(f"passes.share_prefixes is '{self.share_prefixes}': give 'auto', 'always' or 'never'")

    def limit(self, device: torch.device) -> int:
        """Most tokens per forward pass on a device."""
        return self.tokens or pass_tokens(device)
