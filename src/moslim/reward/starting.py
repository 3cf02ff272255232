"""What a run starts from: a backbone that gets new heads, or a saved classifier."""

from __future__ import annotations

from collections.abc import Mapping

from moslim.errors import UsageError
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import PreferenceClassifier
from moslim.reward.links import LinkName
from moslim.reward.losses import Corn, CrossEntropy, LevelLoss, Regression
from moslim.reward.sharing import is_classifier, load_classifier

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
