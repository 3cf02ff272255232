"""The critic: how much is still to come before each token of an answer, read from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moslim.loading import transformer_part
from moslim.lora import LoraOptions
from moslim.policy.predictor import kept
from moslim.precision import apply_wide

CRITIC_RATE = 1e-5
"""A policy's usual rate of 1e-6 is too low for a head that starts at 0: verl and OpenRLHF have about this one, too."""


@dataclass
class CriticOptions:
    """What a policy optimizer asks the PolicyTrainer to build.

    Args:
        lora: Adapter of the critic's own on the policy's frozen base; None = a head on the policy's trunk.
        lr: Rate at which its head and adapter are trained; None = :data:`CRITIC_RATE`, or the policy's where that is
            higher.
    """

    lora: LoraOptions | None = None
    lr: float | None = None


class ValueHead(nn.Module):
    """A linear layer from hidden state to value; it starts at 0 everywhere.

    Args:
        hidden_size: ``H``.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values of states in which tokens were chosen: ``[M, H]`` to ``[M]``, float32 or finer."""
        return apply_wide(self.linear, states)[..., 0].clone()  # a view could lose the hooks of FSDP


class TrunkReader:
    """Reads hidden states of answers, without computing logits, for :class:`moslim.policy.logprobs.AnswerPass`.

    Args:
        model: Causal language model in the Hugging Face form, with or without adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """``[B, keep, H]`` at the last positions, or at those given; the arguments are the trunk's."""
        return kept(transformer_part(self.model)(**inputs).last_hidden_state, keep)
