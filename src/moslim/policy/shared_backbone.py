"""One backbone for policy and classifier, and the memory that each model holds.

What memory each role of policy optimisation holds, and what it shares with others.

One backbone for policy and classifier: whether a saved classifier can be put on the policy's base, and how.
"""

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
    """The weights of a role.

    Args:
        role: The role.
        parameters: How many it reads, whoever holds them.
        trained: How many of its own are trained: those that no role before it in the list has.
        alone: Bytes that it would hold as a model by itself.
        added: Bytes that no role before it in the list holds: those of all roles sum up to what is resident.
    """

    role: Role
    parameters: int
    trained: int
    alone: int
    added: int


def resident_weights(models: PolicyModels, scorer: Scorer) -> list[Weights]:
    """Weights by role, of this process; a weight that several roles read is counted once, for the first of them.

    Args:
        models: Policy, reference and critic.
        scorer: The classifier.
    """
    seen: set[int] = set()
    found = []
    for role in ROLES:
        if role == "critic" and models.critic is None:
            continue
        unique = _by_place([*models.weights(role), *(scorer.classifier.parameters() if role == "classifier" else ())])
        new = [tensor for place, tensor in unique.items() if place not in seen]
        seen |= unique.keys()
        found.append(
            Weights(
                role,
                parameters=sum(tensor.numel() for tensor in unique.values()),
                trained=sum(tensor.numel() for tensor in new if tensor.requires_grad and role != "classifier"),
                alone=sum(tensor.nbytes for tensor in unique.values()),
                added=sum(tensor.nbytes for tensor in new),
            )
        )
    return found


def describe(weights: Iterable[Weights]) -> str:
    """One line on what is resident."""
    parts = [f"{own.role} {own.added / MIB:.1f} MiB (of {own.alone / MIB:.1f})" for own in weights]
    return f"Weights held by role (of those that it reads): {', '.join(parts)}."


def _by_place(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """This process's part of each tensor, by where it lies in memory: tied weights lie in one place."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return {tensor.data_ptr(): tensor for tensor in local}


Share = bool | Literal["auto"]


class NotSharedError(ValueError):
    """Classifier and policy cannot stand on one base; the message says why."""


class SharedBackbone(nn.Module):
    """The policy's transformer in the classifier's role, as the backbone of a :class:`PreferenceClassifier`.

    The transformer is no part of it: it is neither moved, saved nor put into another mode with the classifier.

    Args:
        models: PolicyModels with a classifier attached.
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
        """The transformer's."""
        config: PreTrainedConfig = self.transformer.config
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        found: torch.dtype = transformer_part(self._models.policy).dtype
        return found

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
            found = transformer_part(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
            )
        layers = tuple(widened(state) for state in found.hidden_states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=widened(found.last_hidden_state), hidden_states=layers)


def load_scorer(classifier: str, share: Share, models: PolicyModels, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Loads a reward classifier, onto the policy's base or with a backbone of its own.

    Its tokenizer and chat template are its own either way.

    Args:
        classifier: Folder or Hub name.
        share: Whether it shall stand on the policy's base; ``auto``: if it can.
        models: The policy; the classifier is attached to it.
        tokenizer: The policy's.

    Raises:
        UsageError: It shall share but cannot, for the reason given.
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
    """Reads a classifier that can share the policy's base.

    Raises:
        NotSharedError: It cannot.
    """
    if not models.adapted:
        raise NotSharedError("model.lora is null: all weights are trained, so no base stays as it is")
    saved = saved_adapter(classifier)
    if saved is None:
        raise NotSharedError(
            f"'{classifier}' has its backbone merged into it: train the classifier with model.lora and export it with "
            "--form adapter"
        )
    found = transformer_part(models.policy)
    different = _differences(saved.config.backbone, found.config)
    if different:
        raise NotSharedError(
            f"'{classifier}' was trained on '{saved.base}', whose architecture is not the policy's: {different}"
        )
    if fingerprint(base_weights(found)) != saved.fingerprint:
        raise NotSharedError(
            f"'{classifier}' was trained on '{saved.base}', whose weights are not those that the policy starts from "
            "(at bfloat16): give both the same base model"
        )
    own, other = load_tokenizer(saved.folder).get_vocab(), tokenizer.get_vocab()
    if own != other:
        token = min(word for word in own.keys() | other.keys() if own.get(word) != other.get(word))
        raise NotSharedError(
            f"'{classifier}' has another vocabulary than the policy: the id of '{token}' is {own.get(token)} there and "
            f"{other.get(token)} here"
        )
    return saved


def _differences(one: PreTrainedConfig | None, other: PreTrainedConfig) -> str:
    """Entries of two configurations that differ and matter to hidden states, or nothing."""
    a, b = architecture(one) if one else {}, architecture(other)
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return ", ".join(f"{name} is {a.get(name)} there and {b.get(name)} here" for name in names)
