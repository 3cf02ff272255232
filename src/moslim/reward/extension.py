"""More dimensions for a classifier that is trained already."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, NamedTuple, cast

from moslim.errors import UsageError
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import PreferenceClassifier, PreferenceClassifierConfig
from moslim.reward.losses import Corn, LevelLoss
from moslim.reward.pooling import Pooling
from moslim.reward.sharing import load_classifier
from moslim.reward.starting import DEFAULT_LOSSES, refuse_other_link, saved_classifier


class HeadOptions(NamedTuple):
    """Options of new heads, see :class:`~moslim.reward.module.RewardClassifier`."""

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
        kind: Option of :class:`~moslim.reward.module.RewardClassifier` that names the start.
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
