"""MOSLIM: one language model, steerable along many preferences."""

from typing import TYPE_CHECKING

from moslim.reward import modeling as _classifier  # noqa: F401  (registers it with transformers' Auto classes)
from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.data.data_module import PreferenceDataModule as PreferenceDataModule
    from moslim.policy.policy_export import load_policy as load_policy
    from moslim.policy.policy_trainer import PolicyTrainer as PolicyTrainer
    from moslim.policy.supervised_trainer import SupervisedTrainer as SupervisedTrainer
    from moslim.preferences import Dimension as Dimension
    from moslim.preferences import Preference as Preference
    from moslim.preferences import PreferenceSet as PreferenceSet
    from moslim.reward.reward_classifier import RewardClassifier as RewardClassifier
    from moslim.reward.scorer import Scorer as Scorer

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Dimension": "moslim.preferences",
        "PolicyTrainer": "moslim.policy.policy_trainer",
        "Preference": "moslim.preferences",
        "PreferenceDataModule": "moslim.data.data_module",
        "PreferenceSet": "moslim.preferences",
        "RewardClassifier": "moslim.reward.reward_classifier",
        "Scorer": "moslim.reward.scorer",
        "SupervisedTrainer": "moslim.policy.supervised_trainer",
        "load_policy": "moslim.policy.policy_export",
    },
)
