"""One backbone for policy and classifier: whether a saved classifier can be put on the policy's base, and how."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from moslim.checkpoints import fingerprint
from moslim.errors import UsageError
from moslim.identity import architecture
from moslim.loading import transformer_part
from moslim.lora import base_weights
from moslim.models import load_tokenizer
from moslim.policy.roles import Roles, evaluating
from moslim.precision import widened
from moslim.reward.adapter_form import SavedAdapter
from moslim.reward.scorer import Scorer
from moslim.reward.sharing import saved_adapter

Share = bool | Literal["auto"]


class NotSharedError(ValueError):
    """Classifier and policy cannot stand on one base; the message says why."""


class SharedBackbone(nn.Module):
    """The policy's transformer in the classifier's role, as the backbone of a :class:`PreferenceClassifier`.

    The transformer is no part of it: it is neither moved, saved nor put into another mode with the classifier.

    Args:
        roles: Roles with a classifier attached.
    """

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        self._roles = roles

    @property
    def transformer(self) -> Any:
        """The policy's transformer."""
        return transformer_part(self._roles.policy)

    @property
    def config(self) -> PreTrainedConfig:
        """The transformer's."""
        config: PreTrainedConfig = self.transformer.config
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        found: torch.dtype = transformer_part(self._roles.policy).dtype
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
        with self._roles.playing("classifier") as model, evaluating(model):
            found = transformer_part(model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
            )
        layers = tuple(widened(state) for state in found.hidden_states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=widened(found.last_hidden_state), hidden_states=layers)


def load_scorer(classifier: str, share: Share, roles: Roles, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Loads a reward classifier, onto the policy's base or with a backbone of its own.

    Its tokenizer and chat template are its own either way.

    Args:
        classifier: Folder or Hub name.
        share: Whether it shall stand on the policy's base; ``auto``: if it can.
        roles: The policy; the classifier is attached to it.
        tokenizer: The policy's.

    Raises:
        UsageError: It shall share but cannot, for the reason given.
    """
    if share is False:
        return Scorer(classifier, device="cpu")
    try:
        saved = _shareable(classifier, roles, tokenizer)
    except NotSharedError as reason:
        if share is True:
            raise UsageError(
                f"model.share_backbone is true, but {reason}; or set it to false, which gives the classifier a "
                "backbone of its own"
            ) from None
        rank_zero_info(f"The classifier has a backbone of its own, since {reason}.")
        return Scorer(classifier, device="cpu")
    roles.attach(saved)
    rank_zero_info(f"The classifier '{classifier}' is an adapter on the policy's base (model.share_backbone).")
    return Scorer(saved.classifier(SharedBackbone(roles)), load_tokenizer(saved.folder))


def _shareable(classifier: str, roles: Roles, tokenizer: PreTrainedTokenizerBase) -> SavedAdapter:
    """Reads a classifier that can share the policy's base.

    Raises:
        NotSharedError: It cannot.
    """
    if not roles.adapted:
        raise NotSharedError("model.lora is null: all weights are trained, so no base stays as it is")
    saved = saved_adapter(classifier)
    if saved is None:
        raise NotSharedError(
            f"'{classifier}' has its backbone merged into it: train the classifier with model.lora and export it with "
            "--form adapter"
        )
    found = transformer_part(roles.policy)
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
