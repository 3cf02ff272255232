"""Who takes part in policy optimisation: the policy that learns and the reference that it started from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from moslim.lora import LoraOptions, add_lora
from moslim.models import checkpoint_activations


class Roles:
    """The policy, and the reference as a frozen copy of it, or as the same weights with the adapter off.

    It is no ``nn.Module``: the reference is neither trained nor saved, so it stays out of the module's parameters.

    Args:
        model: The causal language model to start from.
        lora: Train a low-rank adapter; None trains all weights, and the reference is a copy.
        gradient_checkpointing: Compute the policy's activations twice to save memory.
    """

    def __init__(self, model: Any, lora: LoraOptions | None, gradient_checkpointing: bool = False) -> None:
        self._copy = None if lora else deepcopy(model).requires_grad_(False).eval()
        if gradient_checkpointing:
            checkpoint_activations(model)
            model.train()  # transformers recomputes activations in training mode only
        self.policy: Any = add_lora(model, lora, name="policy") if lora else model
        _disable_dropout(self.policy)

    @property
    def adapted(self) -> bool:
        """Whether the policy is an adapter on a frozen base."""
        return self._copy is None

    def to(self, device: torch.device) -> None:
        """Moves the reference; the policy is moved as part of the module."""
        if self._copy is not None:
            self._copy.to(device)

    def frozen(self) -> dict[str, Tensor]:
        """The weights that are never trained: the reference, or the base under the adapter."""
        model = self.policy if self._copy is None else self._copy
        return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """Gives the reference model; inside, no gradient may be taken."""
        if self._copy is not None:
            yield self._copy
        else:
            with self.policy.disable_adapter():
                yield self.policy


def _disable_dropout(model: Any) -> None:
    """Sampled and recomputed log-probabilities must agree, so a policy has no dropout, nor its adapter."""
    for owner in (model.config, *model.modules()):  # some layers read a rate from the configuration in every pass
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode and back: under gradient checkpointing, sampling in training mode is wrong."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
