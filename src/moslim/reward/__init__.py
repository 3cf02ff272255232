"""The multi-head reward classifier: model, losses, metrics, training and scoring."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.reward.backbone import FeatureCache as FeatureCache
    from moslim.reward.heads import Link as Link
    from moslim.reward.losses import BradleyTerry as BradleyTerry
    from moslim.reward.losses import Corn as Corn
    from moslim.reward.losses import CrossEntropy as CrossEntropy
    from moslim.reward.losses import LevelLoss as LevelLoss
    from moslim.reward.losses import Regression as Regression
    from moslim.reward.losses import SoftOrdinal as SoftOrdinal
    from moslim.reward.modeling import PreferenceClassifier as PreferenceClassifier
    from moslim.reward.modeling import PreferenceClassifierConfig as PreferenceClassifierConfig

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "BradleyTerry": "moslim.reward.losses",
        "Corn": "moslim.reward.losses",
        "CrossEntropy": "moslim.reward.losses",
        "FeatureCache": "moslim.reward.backbone",
        "LevelLoss": "moslim.reward.losses",
        "Link": "moslim.reward.heads",
        "PreferenceClassifier": "moslim.reward.modeling",
        "PreferenceClassifierConfig": "moslim.reward.modeling",
        "Regression": "moslim.reward.losses",
        "SoftOrdinal": "moslim.reward.losses",
    },
)
