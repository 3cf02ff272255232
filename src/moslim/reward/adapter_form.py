"""A classifier in the adapter form, as it lies in its folder; :mod:`moslim.reward.sharing` lists the files."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor, nn

from moslim.errors import UsageError
from moslim.folders import check_files
from moslim.reward.classifier import PreferenceClassifier, PreferenceClassifierConfig

if TYPE_CHECKING:
    from peft import LoraConfig

HEADS = "heads.safetensors"
BACKBONE = "backbone"
ADAPTER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"


@dataclass
class SavedAdapter:
    """Everything of a classifier but its base model.

    Args:
        folder: Where it was read from.
        config: The classifier's configuration.
        heads: Everything on top of the backbone, by its name in the classifier.
        options: The adapter's options.
        weights: The adapter's weights, by peft's names for an adapter of the backbone.
        base: Hub name or folder of the base model in training.
        fingerprint: Of the base model's weights.
    """

    folder: Path
    config: PreferenceClassifierConfig
    heads: dict[str, Tensor]
    options: LoraConfig
    weights: dict[str, Tensor]
    base: str
    fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Reads a folder in the adapter form."""
        from peft import LoraConfig

        made_on = json.loads((folder / ADAPTER / BASE).read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            config=PreferenceClassifierConfig.from_pretrained(folder),
            heads=load_file(folder / HEADS),
            options=LoraConfig.from_pretrained(str(folder / ADAPTER)),
            weights=load_file(folder / ADAPTER / ADAPTER_WEIGHTS),
            base=made_on["name"],
            fingerprint=made_on["fingerprint"],
        )

    def classifier(self, backbone: nn.Module) -> PreferenceClassifier:
        """Puts configuration and heads, not the adapter, on a backbone.

        Raises:
            UsageError: A weight of the heads is missing or renamed.
        """
        classifier = PreferenceClassifier(self.config, backbone)
        refuse_difference(self.heads, heads(classifier), self.folder / HEADS)
        classifier.load_state_dict(self.heads, strict=False)
        return classifier

    def check(self, wanted: Collection[str]) -> None:
        """Compares the names of the adapter's weights with those that it must have.

        Raises:
            UsageError: A weight is missing or renamed, or a file of the folder is not what was exported.
        """
        refuse_difference(self.weights, wanted, self.folder / ADAPTER / ADAPTER_WEIGHTS)
        check_files(self.folder)


def heads(classifier: PreferenceClassifier) -> dict[str, Tensor]:
    """Everything on top of the backbone."""
    state = classifier.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(f"{BACKBONE}.")}


def refuse_difference(found: Collection[str], wanted: Collection[str], file: Path) -> None:
    """Compares the names of tensors in a file with those that are needed.

    Raises:
        UsageError: They are not the same.
    """
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise UsageError(
            f"'{file}' lacks the weights {missing} and has {unknown}, which have no place: it is incomplete or its "
            "keys are renamed"
        )
