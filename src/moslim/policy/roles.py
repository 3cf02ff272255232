"""Who takes part in policy optimisation: the policy that learns, its critic, the reference that it started from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from moslim.lora import LoraOptions, add_adapter, add_lora
from moslim.models import checkpoint_activations
from moslim.policy.critic import CriticOptions, ValueHead, last_hidden
from moslim.policy.logprobs import answer_logprobs, chunks_by_length


class Roles:
    """The policy; the reference as a frozen copy of it, or as the same weights with the adapter off; a critic, if any.

    It is no ``nn.Module``: the reference is neither trained nor saved, so it stays out of the module's parameters.
    ``policy`` and ``critic`` (a value head) are for the module to register.

    Args:
        model: The causal language model to start from.
        lora: Train a low-rank adapter; None trains all weights, and the reference is a copy.
        gradient_checkpointing: Compute the policy's activations twice to save memory.
        critic: What the policy optimizer asks for; None = no critic.

    Raises:
        ValueError: The critic's adapter has no frozen base to stand on, or would be lost in recomputed activations.
    """

    def __init__(
        self,
        model: Any,
        lora: LoraOptions | None,
        gradient_checkpointing: bool = False,
        critic: CriticOptions | None = None,
    ) -> None:
        self._copy = None if lora else deepcopy(model).requires_grad_(False).eval()
        if gradient_checkpointing:
            checkpoint_activations(model)
            model.train()  # transformers recomputes activations in training mode only
        self.policy: Any = add_lora(model, lora, name="policy") if lora else model
        self._trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.critic = ValueHead(model.config.hidden_size) if critic else None
        self.critic_shares_trunk = critic is not None and critic.lora is None
        if critic is not None and critic.lora is not None:
            _check_critic_lora(lora, gradient_checkpointing)
            self._trained += add_adapter(self.policy, critic.lora, name="critic")
            self._activate_policy()
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
            try:
                with self.policy.disable_adapter():
                    yield self.policy
            finally:
                self._activate_policy()

    def reference_logprobs(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float, rows: int
    ) -> Tensor:
        """``[N, T]`` log-probabilities under the reference; see :func:`answer_logprobs` for the arguments."""
        with self.reference() as reference:
            return answer_logprobs(reference, input_ids, attention_mask, mask, temperature, rows)

    def values(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, rows: int, among: Tensor | None = None
    ) -> Tensor:
        """The critic's values by passes of its own; see :func:`chunks_by_length` for the arguments.

        Returns:
            ``[N, T]`` float32, 0 where masked, or not ``among`` those asked for.
        """
        assert self.critic is not None
        result = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        if not self.critic_shares_trunk:
            self.policy.set_adapter("critic")
        try:
            for chunk in chunks_by_length(input_ids, attention_mask, mask, rows, among):
                hidden = last_hidden(self.policy, chunk.input_ids, chunk.attention_mask)
                result[chunk.index, : chunk.mask.shape[1]] = self.critic(hidden, chunk.mask)
        finally:
            self._activate_policy()
        return result

    def _activate_policy(self) -> None:
        """Whoever made a pass: the policy answers, and gradients reach all that is trained."""
        if self.adapted:
            self.policy.set_adapter("policy")
        for parameter in self._trained:  # peft stops the gradients of the adapters that are not active
            parameter.requires_grad_(True)


def _check_critic_lora(lora: LoraOptions | None, gradient_checkpointing: bool) -> None:
    if lora is None:
        raise ValueError(
            "policy_optimizer.critic_lora puts an adapter on the policy's frozen base, but without model.lora "
            "that base is trained: give model.lora, or leave critic_lora out and have a head on the policy's trunk"
        )
    if gradient_checkpointing:
        raise ValueError(
            "policy_optimizer.critic_lora: gradient_checkpointing would compute the critic's activations again "
            "with the policy's adapter: turn one of them off"
        )


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
