"""The classifier's backbone: initialisation, new dimensions, features and their cache.

A run starts from a backbone that gets new heads, or from a saved classifier, which new dimensions can extend. A frozen
backbone runs once over each text: its pooled hidden states are cached on disk.
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
    """One safetensors file per set of texts, whose name is a hash of all that the features depend on.

    Args:
        folder: Where the files are.
        key: Hash of what turns token ids into features, see :func:`backbone_key`. Tokenizer and length limit count
            through the ids that they lead to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key

    def __call__(self, rows: Sequence[Ids], compute: Callable[[], Tensor]) -> Tensor:
        """Returns the features ``[N, H]`` of ``N`` texts, in the type of ``compute``; from disk where they are whole.

        Args:
            rows: Token ids of each text.
            compute: What makes the features, if need be. They are then saved, whole or not at all.
        """
        key = self._row_key(rows)
        file = self.folder / f"{key}.safetensors"
        if file.exists():
            try:
                return _read(file, key, len(rows))
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                rank_zero_warn(f"cached features '{file}' are unusable ({error}): they are made anew")
        rank_zero_info(f"the backbone runs over {len(rows)} texts, whose features go to {file}")
        features = compute()
        _write(file, key, features)
        return features

    def _row_key(self, rows: Sequence[Ids]) -> str:
        digest = hashlib.sha256(self._key.encode())
        for row in rows:
            digest.update(array("q", [len(row), *row]))
        return digest.hexdigest()


def backbone_key(backbone: nn.Module, *settings: Any) -> str:
    """Hash of a backbone, every bit of it, and of settings as plain data."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read(file: Path, key: str, count: int) -> Tensor:
    with safe_open(file, "pt") as opened:
        noted, features = opened.metadata() or {}, opened.get_tensor("features")
    if noted.get("key") != key or features.ndim != 2 or len(features) != count:
        raise UsageError("they are of other texts or of another backbone")
    if noted.get("checksum") != _checksum(features):
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
        freeze: What the run says; None = it follows from the rest.
        extends: Whether heads are added to a saved classifier.
        adapts: Whether the backbone gets low-rank adapters.

    Raises:
        UsageError: A backbone that must stay as it is would be trained.
    """
    if extends and freeze is False:
        raise UsageError(
            "model.extend leaves the backbone as it is, for the old heads: leave model.freeze_backbone out"
        )
    if adapts and (extends or freeze):
        raise UsageError("model.lora trains the backbone, which is frozen here: set model.lora to null")
    return extends or bool(freeze)


def cached_features(
    classifier: PreferenceClassifier, pad_id: int, folder: Path, trainer: Trainer, rows: Sequence[Ids]
) -> Tensor:
    """Features of texts; the first process of a machine makes and saves what is missing, the others read it.

    Args:
        classifier: The classifier.
        pad_id: What stands on padding.
        folder: Where features are kept.
        trainer: The run's Trainer, all of whose processes must ask.
        rows: Token ids of ``N`` texts.

    Returns:
        ``[N, H]`` float32 or finer, on the CPU.
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
        pad_id: What stands on padding.

    Returns:
        ``[N, H]`` float32 or finer, on the CPU, in the order of the rows.
    """
    training = classifier.backbone.training
    classifier.backbone.eval()
    device = classifier.device
    features = torch.empty(0)
    # Nothing is kept for a backward pass: there is room for twice as many tokens.
    for chosen in like_length(list(map(len, rows)), 2 * pass_tokens(device)):
        ids, mask = pad([rows[i] for i in chosen], pad_id, left=False)
        found = classifier.features(ids.to(device), mask.to(device)).cpu()
        if not len(features):
            features = found.new_empty(len(rows), found.shape[1])
        features[chosen] = found
    classifier.backbone.train(training)
    return features


DEFAULT_LOSSES: Mapping[LinkName, type[LevelLoss]] = {"softmax": CrossEntropy, "corn": Corn, "regression": Regression}
"""The loss that a saved classifier is trained on with, and evaluated, if none is given."""


def start_name(backbone: str | None, classifier: str | None, extend: str | None = None) -> str:
    """Returns what a run starts from, and refuses several starts, none, or one under the wrong name.

    Args:
        backbone: Hub name or folder of a backbone.
        classifier: Hub name or folder of a saved classifier.
        extend: Hub name or folder of a saved classifier that gets more heads.

    Raises:
        UsageError: Not exactly one is given, or ``backbone`` is a saved classifier, whose heads would be lost.
    """
    options = {"backbone": backbone, "classifier": classifier, "extend": extend}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        named = " and ".join(f"model.{name} = '{value}'" for name, value in given.items())
        raise UsageError(
            f"{named} are given at once, but a run has one start, and a saved classifier its own backbone: set the "
            "others to null"
        )
    if not given:
        raise UsageError(
            "give model.backbone, to put new heads on, model.classifier, a saved one to score with or train on, or "
            "model.extend, a saved one to add dimensions to"
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
    for_new_heads: Mapping[str, object],
    base: str | None = None,
) -> PreferenceClassifier:
    """Loads a saved classifier to go on from.

    Args:
        source: Hub name or folder.
        preferences: The dimensions of the run.
        loss: The run's loss; None if none was chosen.
        for_new_heads: Arguments that only new heads can have, by name; all must be None or 0.
        base: Base model of a classifier in the adapter form, where it is not where it was in training.

    Raises:
        UsageError: The classifier has other dimensions, other levels, or another link, or such an argument is given.
    """
    refuse_options(source, for_new_heads)
    classifier = load_classifier(source, base)
    others = [name for name in classifier.preferences.names if name not in preferences.names]
    preferences.columns_in(classifier.preferences, f"classifier in '{source}'")
    if others:
        raise UsageError(
            f"the classifier in '{source}' has the dimensions {classifier.preferences.to_dict()}, but `preferences` "
            f"has {preferences.to_dict()}: add {', '.join(others)}; the order is free"
        )
    refuse_other_link(source, classifier, loss)
    return classifier


def refuse_options(source: str, options: Mapping[str, object]) -> None:
    """Raises a ValueError where an option is given that a saved classifier has decided already."""
    for name, value in options.items():
        if value:
            raise UsageError(f"model.{name} is for new heads, but those of '{source}' are made: leave it out")


def refuse_other_link(source: str, classifier: PreferenceClassifier, loss: LevelLoss | None) -> None:
    """Raises a ValueError where a loss does not fit the heads of a saved classifier."""
    if loss is not None and loss.link != classifier.config.link:
        raise UsageError(
            f"{type(loss).__name__} needs heads with the link '{loss.link}', but those of '{source}' have "
            f"'{classifier.config.link}': leave model.loss out, or give one for that link"
        )


class HeadOptions(NamedTuple):
    """Options of new heads, see :class:`~moslim.reward.reward_classifier.RewardClassifier`."""

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
    """Loads a saved classifier and puts untrained heads beside its own.

    The new dimensions come behind the old ones. Only their heads are trainable: nothing else changes, so the old ones
    put out what they did, to the last bit.

    Args:
        source: Hub name or folder.
        preferences: The new dimensions and, if they are to be evaluated as well, old ones.
        loss: The run's loss; None if none was chosen.
        hidden: Width of a new head's hidden layer; None = linear.
        dropout: Dropout on it.
        base: Base model of a classifier in the adapter form, where it is not where it was in training.

    Raises:
        UsageError: No dimension is new, an old one has other levels now, or the loss needs heads of another kind.
    """
    old = load_classifier(source, base)
    new = [d for d in preferences.dimensions if d.name not in old.preferences.names]
    if not new:
        raise UsageError(
            f"`preferences` names {', '.join(preferences.names)}, for which '{source}' has heads already: name a "
            "dimension to add, or give the folder as model.classifier to train on"
        )
    for dimension in preferences.dimensions:
        if dimension not in new and dimension != old.preferences[dimension.name]:
            raise UsageError(
                f"dimension '{dimension.name}' has the levels {list(dimension.levels)} in `preferences`, but "
                f"{list(old.preferences[dimension.name].levels)} in '{source}': give those, or leave it out"
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
    """Raises a ValueError where a run wants features other than those that the old heads read.

    Args:
        classifier: The classifier.
        options: ``pooling``, ``layer`` and ``max_length`` of the run; None = as they are.
    """
    config = classifier.config
    saved = {"pooling": config.pooling, "layer": config.layer, "max_length": config.pair_length}
    for name, value in options.items():
        if value is not None and value != saved[name] and [value] != saved[name]:
            raise UsageError(
                f"model.{name} is {value}, but the old heads were trained with {saved[name]}, which new ones share: "
                "leave it out"
            )


def frozen_temperatures(classifier: PreferenceClassifier) -> dict[str, float]:
    """Returns the temperature in use, by dimension, of the heads that are not trained."""
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
    kind: Literal["backbone", "classifier", "extend"],
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
        kind: Option of :class:`~moslim.reward.reward_classifier.RewardClassifier` that names the start.
        preferences: The dimensions of the run.
        loss: The run's loss; None = the default of new heads, or the one that fits the heads of a saved classifier.
        heads: Options of new heads.
        max_length: Most tokens of a pair.
        base: Base model of a start that is an adapter, where it is not where it was in training.
        trust_remote_code: Whether code from the backbone's repository may run.

    Raises:
        UsageError: Options do not fit the start.
    """
    if kind == "backbone":
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
    if kind == "extend":
        model = extended_classifier(start, preferences, loss, heads.head_hidden, heads.head_dropout, base)
        refuse_change(model, {"pooling": heads.pooling, "layer": heads.layer, "max_length": max_length})
    else:
        model = saved_classifier(start, preferences, loss, heads._asdict(), base)
    return model, loss or DEFAULT_LOSSES[model.config.link]()
