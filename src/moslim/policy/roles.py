"""Who takes part in policy optimisation: the policy that learns and the reference that it started from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from moslim.lora import LoraOptions, add_lora


class Roles:
    """The policy, and the reference as a frozen copy of it, or as the same weights with the adapter off.

    It is no ``nn.Module``: the reference is neither trained nor saved, so it stays out of the module's parameters.

    Args:
        model: The causal language model to start from.
        lora: Train a low-rank adapter; None trains all weights, and the reference is a copy.
    """

    def __init__(self, model: nn.Module | Any, lora: LoraOptions | None) -> None:
        self._copy = None if lora else deepcopy(model).requires_grad_(False).eval()
        self.policy: Any = add_lora(model, lora, name="policy") if lora else model

    def to(self, device: torch.device) -> None:
        """Moves the reference; the policy is moved as part of the module."""
        if self._copy is not None:
            self._copy.to(device)

    @contextmanager
    def reference(self) -> Iterator[nn.Module | Any]:
        """Gives the reference model; inside, no gradient may be taken."""
        if self._copy is not None:
            yield self._copy
        else:
            with self.policy.disable_adapter():
                yield self.policy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode and back: with dropout or checkpointing on, sampled log-probabilities are wrong."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
