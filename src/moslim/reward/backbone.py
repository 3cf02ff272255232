"""The classifier's backbone: initialisation, new dimensions, features and their cache.

A run starts from a backbone, which gets new heads, or from a saved classifier, to which it can add dimensions. A frozen
backbone runs once over each text, and its pooled hidden states are cached on disk.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moslim.data.prompts import pad
from moslim.ops.length_bucketing import like_length, pass_tokens
from moslim.ops.transformers_compat import own_settings
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import is_classifier, load_classifier
from moslim.reward.heads import LinkName
from moslim.reward.losses import Corn, CrossEntropy, LevelLoss, Regression
from moslim.reward.modeling import Pooling, PreferenceClassifier, PreferenceClassifierConfig
from moslim.utils.errors import UsageError
from moslim.utils.files import whole_file

Ids = Sequence[int]


class FeatureCache:
    """Cache of pooled hidden states on disk, with one safetensors file per sequence of texts.

    A file's name is a hash of ``key`` and of the token ids, which cover the tokenizer and the length limit.

    Args:
        folder: Folder of the files.
        key: Hash of the backbone and the settings that determine features, from :func:`backbone_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key

    def __call__(self, rows: Sequence[Ids], compute: Callable[[], Tensor]) -> Tensor:
        """Returns the features ``[N, H]`` of ``N`` texts, from disk if a valid file exists.

        Args:
            rows: Token ids of each text.
            compute: Function that computes the features if they are not cached. Its result is saved atomically.
        """
        key = self._row_key(rows)
        file = self.folder / f"{key}.safetensors"
        if file.exists():
            try:
                return _read(file, key, len(rows))
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                rank_zero_warn(f"cached features '{file}' are unusable ({error}): they are computed again")
        rank_zero_info(f"the backbone runs over {len(rows)} texts and saves their features in {file}")
        features = compute()
        _write(file, key, features)
        return features

    def _row_key(self, rows: Sequence[Ids]) -> str:
        digest = hashlib.sha256(self._key.encode())
        for row in rows:
            digest.update(array("q", [len(row), *row]))
        return digest.hexdigest()


def backbone_key(backbone: nn.Module, *settings: Any) -> str:
    """Hash of a backbone's state dict and of settings.

    Args:
        backbone: The backbone; every bit of its weights and buffers counts.
        settings: Plain data, hashed by its ``repr``.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read(file: Path, key: str, count: int) -> Tensor:
    with safe_open(file, "pt") as opened:
        metadata, features = opened.metadata() or {}, opened.get_tensor("features")
    if metadata.get("key") != key or features.ndim != 2 or len(features) != count:
        raise UsageError("they belong to other texts or to another backbone")
    if metadata.get("checksum") != _checksum(features):
        raise UsageError("they are damaged")
    return features


def _write(file: Path, key: str, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        save_file({"features": features}, part, metadata={"key": key, "checksum": _checksum(features)})


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(_bytes(features)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def resolve_freeze(freeze: bool | None, extends: bool, adapts: bool) -> bool:
    """Returns whether the backbone is frozen.

    Args:
        freeze: Option ``freeze_backbone`` of the run; None = the value of ``extends``.
        extends: Whether heads are added to a saved classifier.
        adapts: Whether the backbone gets low-rank adapters.

    Raises:
        UsageError: The options would train a backbone that must be frozen.
    """
    if extends and freeze is False:
        raise UsageError(
            "model.freeze_backbone is false, but model.extend freezes the backbone, which the old heads share: leave "
            "model.freeze_backbone out"
        )
    if adapts and (extends or freeze):
        option = "model.extend" if extends else "model.freeze_backbone"
        raise UsageError(f"model.lora trains the backbone, which {option} freezes: set model.lora to null")
    return extends or bool(freeze)


def cached_features(
    classifier: PreferenceClassifier, pad_id: int, folder: Path, trainer: Trainer, rows: Sequence[Ids]
) -> Tensor:
    """Returns the features of texts, computed or from the cache.

    All processes must call this function. The first process of each machine computes and saves missing features, which
    the others read.

    Args:
        classifier: The classifier.
        pad_id: Token id of padding.
        folder: Folder of the cache.
        trainer: The run's Trainer.
        rows: Token ids of ``N`` texts.

    Returns:
        ``[N, H]`` in float32 or higher precision, on the CPU.
    """
    config = classifier.config
    settings = sorted(own_settings(config.backbone).items()), config.pooling, config.layer, str(trainer.precision)
    key = backbone_key(classifier.backbone, *settings)

    def run() -> Tensor:
        with trainer.precision_plugin.forward_context():
            return run_backbone(classifier, rows, pad_id)

    cache = FeatureCache(folder, key)
    if trainer.local_rank > 0:
        trainer.strategy.barrier("features")
    features = cache(rows, run)
    if trainer.local_rank == 0:
        trainer.strategy.barrier("features")
    return features


@torch.no_grad()
def run_backbone(classifier: PreferenceClassifier, rows: Sequence[Ids], pad_id: int) -> Tensor:
    """Runs the backbone once over texts, without dropout.

    Args:
        classifier: The classifier.
        rows: Token ids of ``N`` texts.
        pad_id: Token id of padding.

    Returns:
        ``[N, H]`` in float32 or higher precision, on the CPU, in the order of the rows.
    """
    training = classifier.backbone.training
    classifier.backbone.eval()
    device = classifier.device
    features = torch.empty(0)
    # Without a backward pass, no activations are stored: twice as many tokens fit.
    for row_indices in like_length(list(map(len, rows)), 2 * pass_tokens(device)):
        ids, mask = pad([rows[i] for i in row_indices], pad_id, left=False)
        batch_features = classifier.features(ids.to(device), mask.to(device)).cpu()
        if not len(features):
            features = batch_features.new_empty(len(rows), batch_features.shape[1])
        features[row_indices] = batch_features
    classifier.backbone.train(training)
    return features


DEFAULT_LOSSES: Mapping[LinkName, type[LevelLoss]] = {"softmax": CrossEntropy, "corn": Corn, "regression": Regression}
"""Default loss of a saved classifier by the link of its heads."""


def start_name(backbone: str | None, classifier: str | None, extend: str | None = None) -> str:
    """Returns the Hub name or folder of the model that a run starts from.

    Args:
        backbone: Hub name or folder of a backbone.
        classifier: Hub name or folder of a saved classifier.
        extend: Hub name or folder of a saved classifier that gets more heads.

    Raises:
        UsageError: Not exactly one option is given, or ``backbone`` is a saved classifier, whose heads would be lost.
    """
    options = {"backbone": backbone, "classifier": classifier, "extend": extend}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        assignments = " and ".join(f"model.{name} = '{value}'" for name, value in given.items())
        raise UsageError(
            f"{assignments} are given at once, but a run starts from one model, and a saved classifier includes its "
            "backbone: set the others to null"
        )
    if not given:
        raise UsageError(
            "no model to start from: give model.backbone, which gets new heads, model.classifier, a saved classifier "
            "to score with or train further, or model.extend, a saved classifier that gets more dimensions"
        )
    if backbone is not None and is_classifier(backbone):
        raise UsageError(
            f"model.backbone = '{backbone}' is a saved classifier: give it as model.classifier, with model.backbone "
            f"null, to use its heads, or '{backbone}/backbone' for new heads on its backbone"
        )
    return next(iter(given.values()))


def saved_classifier(
    source: str,
    preferences: PreferenceSet,
    loss: LevelLoss | None,
    head_options: Mapping[str, object],
    base: str | None = None,
) -> PreferenceClassifier:
    """Loads a saved classifier to score with or train further.

    Args:
        source: Hub name or folder.
        preferences: The dimensions of the run.
        loss: The run's loss; None = the default.
        head_options: Options of new heads, by name; all must be None or 0.
        base: Base model of a classifier in the adapter form; None = the one that the adapter names.

    Raises:
        UsageError: The classifier has other dimensions, levels, or another link, or an option of new heads is set.
    """
    refuse_options(source, head_options)
    classifier = load_classifier(source, base)
    absent = [name for name in classifier.preferences.names if name not in preferences.names]
    preferences.columns_in(classifier.preferences, f"classifier in '{source}'")
    if absent:
        raise UsageError(
            f"the classifier in '{source}' has the dimensions {classifier.preferences.to_dict()}, but `preferences` "
            f"has {preferences.to_dict()}: add {', '.join(absent)}, in any order"
        )
    refuse_other_link(source, classifier, loss)
    return classifier


def refuse_options(source: str, options: Mapping[str, object]) -> None:
    """Raises a UsageError if an option of new heads is set for the saved classifier ``source``."""
    for name, value in options.items():
        if value:
            raise UsageError(f"model.{name} is for new heads, but '{source}' has trained heads: leave it out")


def refuse_other_link(source: str, classifier: PreferenceClassifier, loss: LevelLoss | None) -> None:
    """Raises a UsageError if a loss and the heads of the saved classifier ``source`` have different links."""
    if loss is not None and loss.link != classifier.config.link:
        raise UsageError(
            f"{type(loss).__name__} needs heads with the link '{loss.link}', but those of '{source}' have "
            f"'{classifier.config.link}': leave model.loss out, or give a loss for that link"
        )


class HeadOptions(NamedTuple):
    """Options of new heads; see :class:`~moslim.reward.reward_classifier.RewardClassifier`."""

    pooling: Pooling | list[Pooling] | None
    layer: int | None
    head_hidden: int | None
    head_dropout: float


def extended_classifier(
    source: str,
    preferences: PreferenceSet,
    loss: LevelLoss | None,
    hidden: int | None,
    dropout: float,
    base: str | None = None,
) -> PreferenceClassifier:
    """Loads a saved classifier and adds untrained heads.

    The new dimensions follow the old ones. Only their heads are trainable, so the outputs of the old heads remain
    bit-identical.

    Args:
        source: Hub name or folder.
        preferences: The new dimensions, and old ones to evaluate.
        loss: The run's loss; None = the default.
        hidden: Width of a new head's hidden layer; None = linear.
        dropout: Dropout on the hidden layer.
        base: Base model of a classifier in the adapter form; None = the one that the adapter names.

    Raises:
        UsageError: No dimension is new, an old one has other levels, or the loss needs heads with another link.
    """
    old = load_classifier(source, base)
    new = [d for d in preferences.dimensions if d.name not in old.preferences.names]
    if not new:
        raise UsageError(
            f"`preferences` names {', '.join(preferences.names)}, for which '{source}' has heads already: name a "
            "dimension to add, or give the folder as model.classifier to train its heads further"
        )
    for dimension in preferences.dimensions:
        if dimension not in new and dimension != old.preferences[dimension.name]:
            raise UsageError(
                f"dimension '{dimension.name}' has the levels {list(dimension.levels)} in `preferences`, but "
                f"{list(old.preferences[dimension.name].levels)} in '{source}': give the latter, or leave the "
                "dimension out"
            )
    refuse_other_link(source, old, loss)
    config = cast(PreferenceClassifierConfig, deepcopy(old.config))
    config.dimensions += [[d.name, list(d.levels)] for d in new]
    config.added_heads += [{"dimension": d.name, "hidden": hidden, "dropout": dropout} for d in new]
    if config.temperatures is not None:
        config.temperatures += [1.0] * len(new)
    extended = PreferenceClassifier(PreferenceClassifierConfig(**config.to_dict()), old.backbone)
    extended.load_state_dict(old.state_dict(), strict=False)
    extended.requires_grad_(False)
    for d in new:
        extended.added[d.name].requires_grad_(True)
    return extended


def refuse_change(classifier: PreferenceClassifier, options: Mapping[str, Any]) -> None:
    """Raises a UsageError if the run's options would change the features that the old heads read.

    Args:
        classifier: The classifier.
        options: ``pooling``, ``layer`` and ``max_length`` of the run; None = as saved.
    """
    config = classifier.config
    saved = {"pooling": config.pooling, "layer": config.layer, "max_length": config.pair_length}
    for name, value in options.items():
        if value is not None and value != saved[name] and [value] != saved[name]:
            raise UsageError(
                f"model.{name} is {value}, but the old heads were trained with {saved[name]}, which the new heads "
                "share: leave it out"
            )


def frozen_temperatures(classifier: PreferenceClassifier) -> dict[str, float]:
    """Returns the temperatures of the heads that are not trained, by dimension."""
    names = classifier.preferences.names
    temperatures = classifier.config.temperatures or [1.0] * len(names)
    heads = [dict(classifier.added).get(name, classifier.head) for name in names]
    return {
        name: temperature
        for name, temperature, head in zip(names, temperatures, heads, strict=True)
        if not any(parameter.requires_grad for parameter in head.parameters())
    }


def starting_classifier(
    start: str,
    option: Literal["backbone", "classifier", "extend"],
    preferences: PreferenceSet,
    loss: LevelLoss | None,
    heads: HeadOptions,
    max_length: int | None,
    base: str | None,
    trust_remote_code: bool,
) -> tuple[PreferenceClassifier, LevelLoss]:
    """Returns the classifier that a run starts with, and its loss on levels.

    Args:
        start: Hub name or folder.
        option: Option of :class:`~moslim.reward.reward_classifier.RewardClassifier` that gives ``start``.
        preferences: The dimensions of the run.
        loss: The run's loss; None = :class:`Corn` for a backbone, else the default for the saved heads' link.
        heads: Options of new heads.
        max_length: Maximum number of tokens of a pair; None = no limit for a backbone, else as saved.
        base: Base model if ``start`` is an adapter; None = the one that the adapter names.
        trust_remote_code: Whether code from the backbone's repository may run.

    Raises:
        UsageError: An option conflicts with the saved classifier, or a backbone is unsuitable.
    """
    if option == "backbone":
        loss = loss or Corn()
        model = PreferenceClassifier.from_backbone(
            start,
            preferences,
            pooling=heads.pooling,
            layer=heads.layer,
            max_length=max_length,
            link=loss.link,
            head_hidden=heads.head_hidden,
            head_dropout=heads.head_dropout,
            trust_remote_code=trust_remote_code,
            base=base,
        )
        return model, loss
    if option == "extend":
        model = extended_classifier(start, preferences, loss, heads.head_hidden, heads.head_dropout, base)
        refuse_change(model, {"pooling": heads.pooling, "layer": heads.layer, "max_length": max_length})
    else:
        model = saved_classifier(start, preferences, loss, heads._asdict(), base)
    return model, loss or DEFAULT_LOSSES[model.config.link]()
