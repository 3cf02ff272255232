"""Export of a classifier to a folder that loads with or without moslim.

Merged form: ``backbone/`` is a plain ``AutoModel`` folder, and an index joins its weights with the heads. So no weight
is stored twice. ``AutoModelForSequenceClassification`` (after ``import moslim``) loads the folder, and ``AutoModel``
its backbone::

    config.json  model.safetensors.index.json  heads.safetensors  backbone/

Adapter form: a peft adapter of the backbone, with name and fingerprint of its base model::

    config.json  heads.safetensors  adapter/  adapter/base.json

Both forms include the tokenizer, a model card (``README.md``) and the training record (``training.json``).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moslim.ops.adapters import AdapterFolder
from moslim.ops.loading import CLASSIFIER_TYPE, named
from moslim.ops.lora import PEFT_PREFIX, base_weights
from moslim.ops.models import align, load_backbone
from moslim.reward.modeling import PreferenceClassifier, PreferenceClassifierConfig
from moslim.training.checkpointing import fingerprint
from moslim.utils.errors import MissingFileError, UsageError
from moslim.utils.folders import check_files, finish_exchange, whole_folder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


HEADS = "heads.safetensors"
BACKBONE = "backbone"
ADAPTER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"


@dataclass
class SavedAdapter:
    """Content of a classifier in the adapter form: everything except the base model.

    Args:
        folder: Folder of the classifier.
        config: The classifier's configuration.
        heads: All weights outside the backbone, by their names in the classifier.
        options: The adapter's options.
        weights: The adapter's weights, by peft's names for an adapter of the backbone.
        base: Hub name or folder of the base model in training.
        fingerprint: Fingerprint of the base model's weights.
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

        base = json.loads((folder / ADAPTER / BASE).read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            config=PreferenceClassifierConfig.from_pretrained(folder),
            heads=load_file(folder / HEADS),
            options=LoraConfig.from_pretrained(str(folder / ADAPTER)),
            weights=load_file(folder / ADAPTER / ADAPTER_WEIGHTS),
            base=base["name"],
            fingerprint=base["fingerprint"],
        )

    def classifier(self, backbone: nn.Module) -> PreferenceClassifier:
        """Returns a classifier with the saved heads on a backbone, without the adapter.

        Raises:
            UsageError: A weight of the heads is missing or renamed.
        """
        classifier = PreferenceClassifier(self.config, backbone)
        refuse_difference(self.heads, heads(classifier), self.folder / HEADS)
        classifier.load_state_dict(self.heads, strict=False)
        return classifier

    def check(self, expected: Collection[str]) -> None:
        """Checks the names of the adapter's weights and the files of the folder.

        Args:
            expected: Names that the weights must have.

        Raises:
            UsageError: A weight is missing or renamed, or a file has changed since the export.
        """
        refuse_difference(self.weights, expected, self.folder / ADAPTER / ADAPTER_WEIGHTS)
        check_files(self.folder)


def heads(classifier: PreferenceClassifier) -> dict[str, Tensor]:
    """Returns all weights outside the backbone, by name."""
    state = classifier.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(f"{BACKBONE}.")}


def refuse_difference(names: Collection[str], expected: Collection[str], file: Path) -> None:
    """Checks the names of the tensors in a file.

    Args:
        names: Names in the file.
        expected: Names that the model needs.
        file: The file, named in the error.

    Raises:
        UsageError: The names differ.
    """
    missing, unknown = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unknown:
        raise UsageError(
            f"'{file}' lacks the weights {missing} and has {unknown}, which the model does not have: the file is "
            "incomplete or its keys are renamed; export the classifier again"
        )


Form = Literal["merged", "adapter"]

_INDEX = "model.safetensors.index.json"


def save_merged(classifier: PreferenceClassifier, folder: Path) -> None:
    """Saves a classifier without an adapter in the merged form.

    Args:
        classifier: The classifier.
        folder: Target folder; an earlier classifier in it is replaced.

    Raises:
        UsageError: The folder holds another model.
    """
    with whole_folder(folder, is_classifier) as part:
        head_weights = heads(classifier)
        save_file(head_weights, part / HEADS, metadata={"format": "pt"})
        classifier.backbone.save_pretrained(part / BACKBONE)
        weight_map = dict.fromkeys(head_weights, HEADS)
        for file in sorted((part / BACKBONE).glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                weight_map |= dict.fromkeys(weights.keys(), f"{BACKBONE}/{file.name}")
        size = sum(tensor.nbytes for tensor in classifier.state_dict().values())
        _write_json(part / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _save_config(classifier, part)


def save_adapter(adapted: PeftModel, base: str, folder: Path) -> None:
    """Saves a classifier with a low-rank adapter in the adapter form.

    Args:
        adapted: The classifier with its adapter.
        base: Hub name or folder of the base model.
        folder: Target folder; an earlier classifier in it is replaced.

    Raises:
        UsageError: The adapter changes more than the backbone, or the folder holds another model.
    """
    from peft import get_peft_model_state_dict

    prefix = f"{PEFT_PREFIX}{BACKBONE}."
    tensors = get_peft_model_state_dict(adapted)
    outside = sorted(name for name in tensors if not name.startswith(prefix))
    if outside:
        raise UsageError(f"the adapter changes more than the backbone ({outside}): export the merged form")
    options = deepcopy(adapted.peft_config[adapted.active_adapter])
    options.base_model_name_or_path = base
    tensors = {PEFT_PREFIX + name.removeprefix(prefix): tensor.contiguous() for name, tensor in tensors.items()}
    classifier: Any = adapted.get_base_model()
    base_record = {"name": base, "fingerprint": fingerprint(base_weights(classifier.backbone))}
    with whole_folder(folder, is_classifier) as part:
        (part / ADAPTER).mkdir()
        options.save_pretrained(str(part / ADAPTER))
        save_file(tensors, part / ADAPTER / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _write_json(part / ADAPTER / BASE, base_record)
        save_file(heads(classifier), part / HEADS, metadata={"format": "pt"})
        _save_config(classifier, part)


def load_classifier(source: str | Path, base: str | Path | None = None) -> PreferenceClassifier:
    """Loads a classifier in either form; an adapter is merged into its base model.

    Args:
        source: Folder or Hub name.
        base: Folder or Hub name of the base model of the adapter form; None = the one that the adapter names.

    Raises:
        MissingFileError: The classifier or an adapter's base model does not exist.
        UsageError: ``source`` is no classifier, a weight is missing or renamed, the base model has other weights, or
            ``base`` is given for a classifier that needs none.
    """
    saved = saved_adapter(source)
    if saved is not None:
        return _load_adapted(saved, base)
    if base is not None:
        raise UsageError(f"'{source}' is no adapter: it includes its backbone, so leave out base = '{base}'")
    folder = local_folder(source)
    if not is_classifier(folder):
        raise UsageError(
            f"'{source}' is no saved classifier, but another model: to train new heads on it, give it as model.backbone"
        )
    return PreferenceClassifier.from_pretrained(folder)


def saved_adapter(source: str | Path) -> SavedAdapter | None:
    """Reads a classifier in the adapter form; returns None if ``source`` has no adapter.

    Args:
        source: Folder or Hub name.

    Raises:
        MissingFileError: The classifier does not exist.
    """
    folder = local_folder(source)
    if not (folder / ADAPTER).is_dir():
        return None
    with named(folder):
        return SavedAdapter.read(folder)


def is_classifier(source: str | Path) -> bool:
    """Whether a folder or Hub name holds a saved classifier, in either form.

    Raises:
        MissingFileError: It holds no model.
    """
    if AdapterFolder.find(source) is not None:
        return False
    with named(source):
        config, _ = PreferenceClassifierConfig.get_config_dict(source)
    return config.get("model_type") == CLASSIFIER_TYPE


def _load_adapted(saved: SavedAdapter, base: str | Path | None) -> PreferenceClassifier:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    backbone = _load_base(str(base or saved.base), saved.folder)
    classifier = saved.classifier(backbone)
    if fingerprint(base_weights(backbone)) != saved.fingerprint:
        raise UsageError(
            f"the adapter in '{saved.folder}' was trained on other weights than those of '{base or saved.base}': give "
            f"the base model of training, which was '{saved.base}', as `base`"
        )
    adapted = get_peft_model(backbone, saved.options)
    saved.check(get_peft_model_state_dict(adapted))
    set_peft_model_state_dict(adapted, saved.weights)
    classifier.backbone = adapted.merge_and_unload()  # type: ignore[operator]
    align(classifier)
    return classifier.requires_grad_(True).eval()


def _load_base(name: str, folder: Path) -> PreTrainedModel:
    try:
        if is_classifier(name):
            return load_classifier(name).backbone
        return load_backbone(name)
    except MissingFileError as error:
        raise MissingFileError(
            f"the adapter in '{folder}' needs its base model '{name}', which cannot be loaded ({error}): give its "
            f"place as model.base, Scorer(folder, base=...) or `name` in {ADAPTER}/{BASE}, or use the merged form, "
            "which needs no base model"
        ) from error


def local_folder(source: str | Path) -> Path:
    """Returns the folder of a classifier, and downloads it if it is on the Hub.

    Raises:
        MissingFileError: The classifier does not exist.
    """
    if Path(source).is_dir():
        finish_exchange(source)
        return Path(source)
    try:
        return Path(snapshot_download(str(source)))
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"there is no classifier '{source}': it is no folder, and not on the Hub ({error}); check the name"
        ) from error


def _save_config(classifier: PreferenceClassifier, folder: Path) -> None:
    config = deepcopy(classifier.config)
    config.architectures = [type(classifier).__name__]
    config.dtype = str(classifier.dtype).removeprefix("torch.")
    config.save_pretrained(folder)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
