"""One backbone for policy and classifier, and the memory that the weights of each role take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from moslim.ops.loading import transformer_part
from moslim.ops.lora import base_weights
from moslim.ops.models import load_tokenizer
from moslim.ops.numerics import widened
from moslim.policy.policy_models import PolicyModels, Role, evaluating
from moslim.reward.classifier_export import SavedAdapter, saved_adapter
from moslim.reward.scorer import Scorer
from moslim.training.checkpointing import fingerprint
from moslim.training.identity import architecture
from moslim.utils.errors import UsageError

MIB = 2**20
ROLES: tuple[Role, ...] = ("policy", "reference", "classifier", "critic")


@dataclass
class Weights:
    """Number and size of the weights of a role.

    Args:
        role: The role.
        parameters: Number of parameters that its forward pass reads, shared ones included.
        trained: Number of trained parameters that no earlier role in the list has.
        alone: Bytes of all its parameters.
        added: Bytes of the parameters that no earlier role in the list has; the sum over roles is resident memory.
    """

    role: Role
    parameters: int
    trained: int
    alone: int
    added: int


def resident_weights(models: PolicyModels, scorer: Scorer) -> list[Weights]:
    """Weights by role in this process; a shared weight counts as added for the first role that reads it.

    Args:
        models: Policy, reference and critic.
        scorer: The classifier.
    """
    seen: set[int] = set()
    by_role = []
    for role in ROLES:
        if role == "critic" and models.critic is None:
            continue
        unique = _by_place([*models.weights(role), *(scorer.classifier.parameters() if role == "classifier" else ())])
        new = [tensor for place, tensor in unique.items() if place not in seen]
        seen |= unique.keys()
        by_role.append(
            Weights(
                role,
                parameters=sum(tensor.numel() for tensor in unique.values()),
                trained=sum(tensor.numel() for tensor in new if tensor.requires_grad and role != "classifier"),
                alone=sum(tensor.nbytes for tensor in unique.values()),
                added=sum(tensor.nbytes for tensor in new),
            )
        )
    return by_role


def describe(weights: Iterable[Weights]) -> str:
    """One line of text with the memory of each role."""
    parts = [f"{entry.role} {entry.added / MIB:.1f} MiB (of {entry.alone / MIB:.1f})" for entry in weights]
    return f"Weights held by role (of those that it reads): {', '.join(parts)}."


def _by_place(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """The local part of each tensor by its memory address, so that tied weights count once."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return {tensor.data_ptr(): tensor for tensor in local}


Share = bool | Literal["auto"]


class NotSharedError(ValueError):
    """Raised if classifier and policy cannot share a base; the message gives the reason."""


class SharedBackbone(nn.Module):
    """The policy's transformer with the classifier's adapter, as the backbone of a :class:`PreferenceClassifier`.

    The transformer is not a submodule, so it is not moved, saved or switched to another mode with the classifier.

    Args:
        models: Models of the policy, with a classifier attached.
    """

    def __init__(self, models: PolicyModels) -> None:
        super().__init__()
        self._models = models

    @property
    def transformer(self) -> Any:
        """The policy's transformer."""
        return transformer_part(self._models.policy)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the transformer."""
        config: PreTrainedConfig = self.transformer.config
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The type of the transformer's weights."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Hidden states ``[B, T, H]`` of pairs ``[B, T]``, float32 or finer, without gradient."""
        with self._models.activate("classifier") as model, evaluating(model):
            outputs = transformer_part(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
            )
        layers = tuple(widened(state) for state in outputs.hidden_states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=widened(outputs.last_hidden_state), hidden_states=layers)


def load_scorer(classifier: str, share: Share, models: PolicyModels, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Loads a reward classifier as an adapter on the policy's base or with its own backbone.

    It has its own tokenizer and chat template in both cases.

    Args:
        classifier: Folder or Hub name of the classifier.
        share: Whether it shares the policy's base; ``auto``: if possible.
        models: Models of the policy; a sharing classifier is attached to them.
        tokenizer: Tokenizer of the policy.

    Raises:
        UsageError: ``share`` is true, but sharing is not possible.
    """
    if share is False:
        return Scorer(classifier, device="cpu")
    try:
        saved = _shareable(classifier, models, tokenizer)
    except NotSharedError as reason:
        if share is True:
            raise UsageError(
                f"model.share_backbone is true, but {reason}; or set it to false, which gives the classifier a "
                "backbone of its own"
            ) from None
        rank_zero_info(f"The classifier has a backbone of its own, since {reason}.")
        return Scorer(classifier, device="cpu")
    models.attach(saved)
    rank_zero_info(f"The classifier '{classifier}' is an adapter on the policy's base (model.share_backbone).")
    return Scorer(saved.classifier(SharedBackbone(models)), load_tokenizer(saved.folder))


def _shareable(classifier: str, models: PolicyModels, tokenizer: PreTrainedTokenizerBase) -> SavedAdapter:
    """Reads the adapter of a classifier that can share the policy's base.

    Raises:
        NotSharedError: The classifier cannot share it.
    """
    if not models.adapted:
        raise NotSharedError("model.lora is null: all weights are trained, so no base stays as it is")
    saved = saved_adapter(classifier)
    if saved is None:
        raise NotSharedError(
            f"'{classifier}' has its backbone merged into it: train the classifier with model.lora and export it with "
            "--form adapter"
        )
    transformer = transformer_part(models.policy)
    different = _differences(saved.config.backbone, transformer.config)
    if different:
        raise NotSharedError(
            f"'{classifier}' was trained on '{saved.base}', whose architecture is not the policy's: {different}"
        )
    if fingerprint(base_weights(transformer)) != saved.fingerprint:
        raise NotSharedError(
            f"'{classifier}' was trained on '{saved.base}', whose weights are not those that the policy starts from "
            "(at bfloat16): give both the same base model"
        )
    classifier_ids, policy_ids = load_tokenizer(saved.folder).get_vocab(), tokenizer.get_vocab()
    if classifier_ids != policy_ids:
        tokens = classifier_ids.keys() | policy_ids.keys()
        token = min(token for token in tokens if classifier_ids.get(token) != policy_ids.get(token))
        raise NotSharedError(
            f"'{classifier}' has another vocabulary than the policy: the id of '{token}' is "
            f"{classifier_ids.get(token)} there and {policy_ids.get(token)} here"
        )
    return saved


def _differences(classifier: PreTrainedConfig | None, policy: PreTrainedConfig) -> str:
    """The entries of two configurations that differ and affect hidden states, as text; empty if none."""
    saved, current = architecture(classifier) if classifier else {}, architecture(policy)
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    return ", ".join(f"{name} is {saved.get(name)} there and {current.get(name)} here" for name in names)
