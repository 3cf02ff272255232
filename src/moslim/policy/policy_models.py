"""The models of policy optimisation and their shared weights: policy, critic, reference and classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moslim.algorithms.functional import CriticOptions, HiddenStateReader, ValueHead
from moslim.ops.chunked_linear import Predictor
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.loading import freeze_unread, hidden_width, transformer_part, unwrapped
from moslim.ops.logprobs import CompletionPass, ForwardConfig, completion_logprobs, plan
from moslim.ops.lora import LoraOptions, add_adapter, add_lora, attach_adapter, base_weights
from moslim.ops.models import checkpoint_activations
from moslim.ops.numerics import at_least_float32
from moslim.reward.classifier_export import SavedAdapter
from moslim.training.distributed import StepShards
from moslim.utils.errors import UsageError

Role = Literal["policy", "reference", "classifier", "critic"]


class PolicyModels:
    """Policy, reference, critic and classifier in one object; :meth:`activate` selects the role of a forward pass.

    With LoRA they share one frozen base: policy, critic and classifier are adapters or heads on it, and the reference
    is the base with the adapters off. Without LoRA all weights are trained and the reference is a frozen copy.

    This is not an ``nn.Module``, so that the reference, which is neither trained nor saved, is no submodule. The
    LightningModule registers ``policy`` and ``critic`` (a value head).

    Args:
        model: Causal language model to start from.
        lora: Options of the policy's low-rank adapter; None = all weights are trained.
        gradient_checkpointing: Whether activations are recomputed in the backward pass to save memory.
        critic: Options of the critic; None = no critic.

    Attributes:
        active: Role that is active at present.

    Raises:
        UsageError: An adapter has dropout, or the critic has an adapter without ``lora`` or with
            ``gradient_checkpointing``.
    """

    def __init__(
        self,
        model: Any,
        lora: LoraOptions | None,
        gradient_checkpointing: bool = False,
        critic: CriticOptions | None = None,
    ) -> None:
        _refuse_dropout("model.lora", lora)
        _refuse_dropout("policy_optimizer.critic_lora", critic.lora if critic else None)
        freeze_unread(model)
        self._copy = None if lora else deepcopy(model).requires_grad_(False).eval()
        if gradient_checkpointing:
            checkpoint_activations(model)
            model.train()  # transformers recomputes activations in training mode only
        self.policy: Any = add_lora(model, lora, name="policy") if lora else model
        self.critic = ValueHead(hidden_width(model.config)).to(at_least_float32(model.dtype)) if critic else None
        self.critic_shares_backbone = critic is not None and critic.lora is None
        self.active: Role = "policy"
        self._adapters: dict[Role, list[str]] = {}  # names: sharding puts other parameters in their places
        self._shards: list[StepShards] = []
        if lora is not None:
            self._adapters["policy"] = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        if critic is not None and critic.lora is not None:
            _check_critic_lora(lora, gradient_checkpointing)
            self._adapters["critic"] = self._names(add_adapter(self.policy, critic.lora, name="critic"))
            self._switch("policy")
        _disable_dropout(self.policy)

    @property
    def adapted(self) -> bool:
        """Whether the policy is an adapter on a frozen base."""
        return self._copy is None

    def attach(self, classifier: SavedAdapter) -> None:
        """Adds the frozen adapter of a classifier to the policy's base, see :mod:`moslim.policy.shared_backbone`.

        Raises:
            UsageError: The adapter does not fit the base.
        """
        part = transformer_part(self.policy)
        inside = next(name for name, module in self.policy.get_base_model().named_modules() if module is part)
        added = attach_adapter(self.policy, classifier.options, classifier.weights, "classifier", inside)
        self._adapters["classifier"] = self._names(added)
        self._switch("policy")

    @property
    def shares_classifier(self) -> bool:
        """Whether the reward classifier is an adapter on the policy's base."""
        return "classifier" in self._adapters

    def to(self, device: torch.device, convert: Callable[[nn.Module], nn.Module]) -> None:
        """Moves the reference to the device and converts it to the precision of the run."""
        if self._copy is not None:
            self._copy = convert(self._copy).to(device)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of the weights between steps."""
        return bool(self._shards)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards the weights of all roles, see :class:`~moslim.training.distributed.StepShards`."""
        models = (unwrapped(self.policy), self.critic, self._copy)
        self._shards = [StepShards(model, mesh) for model in models if model is not None]

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """The weights of the critic only: its head, and its adapter if it has one."""
        return [*(self.critic.parameters() if self.critic is not None else ()), *self.adapter("critic")]

    def gather(self) -> None:
        """Gathers sharded weights for a step; those of a copied reference are gathered at its first use."""
        for shards in self._trained_shards:
            shards.gather()

    def gather_again(self) -> None:
        """Gathers weights again after writing a checkpoint has sharded them."""
        for shards in self._shards:
            if shards.whole:
                shards.gather()

    def release(self) -> None:
        """Reshards the weights after a step."""
        for shards in self._shards:
            shards.release()

    @property
    def _trained_shards(self) -> list[StepShards]:
        return self._shards if self._copy is None else self._shards[:-1]

    def frozen(self) -> dict[str, Tensor]:
        """The weights of the reference by names that do not depend on adapters."""
        return base_weights(self.policy if self._copy is None else self._copy)

    def weights(self, role: Role) -> list[Tensor]:
        """All weights that a forward pass in a role reads, shared ones and the head of the critic included.

        For the classifier: those on the policy's base, without its heads; empty if it shares none.
        """
        if role == "classifier" and not self.shares_classifier:
            return []
        if role == "reference" and self._copy is not None:
            return list(self._copy.parameters())
        others = {id(p) for other in self._adapters if other != self._adapter(role) for p in self.adapter(other)}
        head = self.critic.parameters() if role == "critic" and self.critic is not None else ()
        return [*(p for p in self.policy.parameters() if id(p) not in others), *head]

    def adapter(self, role: Role) -> list[nn.Parameter]:
        """The weights of a role's own adapter; empty without one."""
        return [self.policy.get_parameter(name) for name in self._adapters.get(role, ())]

    @contextmanager
    def activate(self, role: Role) -> Iterator[Any]:
        """Context manager that activates a role and returns its model; the earlier role is active again afterwards.

        Contexts may be nested. Only policy and critic have gradients, and their backward pass may follow the context.
        """
        before = self.active
        try:
            self._switch(role)
            copied = role == "reference" and self._copy is not None
            if copied and self._shards:
                self._shards[-1].gather()
            yield self._copy if copied else self.policy
        finally:
            self._switch(before)

    def reference(self) -> AbstractContextManager[Any]:
        """Context manager that activates the reference and returns its model; it has no gradient."""
        return self.activate("reference")

    def ref_logprobs(self, batch: CompletionBatch, temperature: float, forward_config: ForwardConfig) -> Tensor:
        """``[N, T]`` log-probabilities under the reference; see :func:`completion_logprobs` for the arguments."""
        with self.reference() as reference:
            return completion_logprobs(reference, batch, temperature, forward_config)

    @torch.no_grad()
    def reference_states(
        self, passes: Sequence[CompletionPass], forward_config: ForwardConfig
    ) -> list[tuple[Predictor, Tensor]]:
        """States of the reference for all passes, computed together since each switch of the active role takes time."""
        with self.reference() as reference:
            predictor = Predictor(reference, forward_config.chunked_logprobs)
            return [(predictor, forward_pass.states(predictor)) for forward_pass in passes]

    def values(self, batch: CompletionBatch, forward_config: ForwardConfig, among: Tensor | None = None) -> Tensor:
        """Values of the critic by separate forward passes; see :func:`~moslim.ops.logprobs.plan` for the arguments.

        Returns:
            ``[N, T]`` values, float32 or finer; 0 where masked or not ``among`` the requested completions.
        """
        assert self.critic is not None
        with self.activate("critic") as model:
            result = torch.zeros(batch.mask.shape, dtype=at_least_float32(model.dtype), device=batch.mask.device)
            for forward_pass in plan(model, batch, forward_config, among):
                forward_pass.put(result, self.critic(forward_pass.states(HiddenStateReader(model))))
        return result

    def _adapter(self, role: Role) -> Role | None:
        """The adapter that a role needs; a critic without an adapter reads the policy's hidden states."""
        if role == "reference":
            return None
        return role if role in self._adapters else "policy"

    def _switch(self, role: Role) -> None:
        """Activates the adapter of a role, or none, and restores which weights have gradients."""
        self.active = role
        if not self.adapted:
            return
        adapter = self._adapter(role)
        if adapter is None:
            self.policy.base_model.disable_adapter_layers()
        else:
            self.policy.base_model.enable_adapter_layers()
            self.policy.set_adapter(adapter)
        # peft disables gradients of inactive adapters, whose backward pass may still follow, and enables the active one
        for other in self._adapters:
            for parameter in self.adapter(other):
                parameter.requires_grad_(adapter is not None and other != "classifier")

    def _names(self, parameters: list[nn.Parameter]) -> list[str]:
        wanted = {id(parameter) for parameter in parameters}
        return [name for name, parameter in self.policy.named_parameters() if id(parameter) in wanted]


def _check_critic_lora(lora: LoraOptions | None, gradient_checkpointing: bool) -> None:
    if lora is None:
        raise UsageError(
            "policy_optimizer.critic_lora puts an adapter on the policy's frozen base, but without model.lora "
            "that base is trained: give model.lora, or leave critic_lora out for a head on the policy's hidden states"
        )
    if gradient_checkpointing:
        raise UsageError(
            "policy_optimizer.critic_lora: gradient_checkpointing would compute the critic's activations again "
            "with the policy's adapter: turn one of them off"
        )


def _refuse_dropout(option: str, lora: LoraOptions | None) -> None:
    if lora is not None and lora.dropout:
        raise UsageError(
            f"{option}.dropout is {lora.dropout}: a policy has no dropout, nor has its adapter or critic, since the "
            "probabilities of sampled completions are computed again and must agree: leave it out"
        )


def _disable_dropout(model: Any) -> None:
    """Sets all dropout rates to 0, since sampled and recomputed log-probabilities must agree."""
    configs = (model.config, model.config.get_text_config())
    for owner in (*configs, *model.modules()):  # some layers read a rate from the configuration in each forward pass
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager with a model in eval mode, since sampling in training mode fails with gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
