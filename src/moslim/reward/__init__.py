"""The multi-head reward classifier: model, losses, metrics, training and scoring."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.reward.classifier import PreferenceClassifier as PreferenceClassifier
    from moslim.reward.classifier import PreferenceClassifierConfig as PreferenceClassifierConfig
    from moslim.reward.comparisons import BradleyTerry as BradleyTerry
    from moslim.reward.evaluation.best_of import BestOf as BestOf
    from moslim.reward.features import FeatureCache as FeatureCache
    from moslim.reward.links import Link as Link
    from moslim.reward.losses import Corn as Corn
    from moslim.reward.losses import CrossEntropy as CrossEntropy
    from moslim.reward.losses import LevelLoss as LevelLoss
    from moslim.reward.losses import Regression as Regression
    from moslim.reward.losses import SoftOrdinal as SoftOrdinal

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BestOf": "moslim.reward.evaluation.best_of",
        "BradleyTerry": "moslim.reward.comparisons",
        "Corn": "moslim.reward.losses",
        "CrossEntropy": "moslim.reward.losses",
        "FeatureCache": "moslim.reward.features",
        "LevelLoss": "moslim.reward.losses",
        "Link": "moslim.reward.links",
        "PreferenceClassifier": "moslim.reward.classifier",
        "PreferenceClassifierConfig": "moslim.reward.classifier",
        "Regression": "moslim.reward.losses",
        "SoftOrdinal": "moslim.reward.losses",
    },
)
