"""How log-probabilities of answers are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from moslim.packing import SharePrompts, pass_tokens


@dataclass(frozen=True)
class Passes:
    """How answers are put through policy, reference, critic and classifier. All ways give the same numbers.

    Args:
        tokens: Most tokens per forward pass, padding included; None = 1024 on a CPU, where small passes stay in the
            cache, else 32768.
        share_prompts: Compute each prompt once, and let its answers continue from there; ``auto`` does where enough
            tokens are saved. Architectures that cannot compute prompts with every answer.
        chunked_logprobs: Never hold the logits of all tokens; where the architecture forbids that, they are held.
    """

    tokens: int | None = None
    share_prompts: SharePrompts = "auto"
    chunked_logprobs: bool = True

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"passes.tokens is {self.tokens}: give 1 or more")
        if self.share_prompts not in get_args(SharePrompts):
            raise ValueError(f"passes.share_prompts is '{self.share_prompts}': give 'auto', 'always' or 'never'")

    def limit(self, device: torch.device) -> int:
        """Most tokens per forward pass on a device."""
        return self.tokens or pass_tokens(device)
