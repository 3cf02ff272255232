"""MOSLIM: one language model, steerable along many preferences."""

from typing import TYPE_CHECKING

from moslim.reward import classifier as _classifier  # noqa: F401  (registers it with transformers' Auto classes)
from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.data.module import PreferenceDataModule as PreferenceDataModule
    from moslim.policy.module import PolicyTrainer as PolicyTrainer
    from moslim.policy.shared import load_policy as load_policy
    from moslim.preferences import Dimension as Dimension
    from moslim.preferences import Preference as Preference
    from moslim.preferences import PreferenceSet as PreferenceSet
    from moslim.reward.module import RewardClassifier as RewardClassifier
    from moslim.reward.scorer import Scorer as Scorer
    from moslim.supervised.module import SupervisedTrainer as SupervisedTrainer

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Dimension": "moslim.preferences",
        "PolicyTrainer": "moslim.policy.module",
        "Preference": "moslim.preferences",
        "PreferenceDataModule": "moslim.data.module",
        "PreferenceSet": "moslim.preferences",
        "RewardClassifier": "moslim.reward.module",
        "Scorer": "moslim.reward.scorer",
        "SupervisedTrainer": "moslim.supervised.module",
        "load_policy": "moslim.policy.shared",
    },
)
