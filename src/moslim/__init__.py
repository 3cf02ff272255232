"""MOSLIM: one language model, steerable along many preferences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moslim.preferences import PreferenceSet
from moslim.reward import classifier as _classifier  # noqa: F401  (registers it with transformers' Auto classes)

if TYPE_CHECKING:
    from moslim.data.module import PreferenceDataModule
    from moslim.policy.module import PolicyTrainer
    from moslim.reward.module import RewardClassifier
    from moslim.supervised.module import SupervisedTrainer

__version__ = "0.1.0"
__all__ = ["PolicyTrainer", "PreferenceDataModule", "PreferenceSet", "RewardClassifier", "SupervisedTrainer"]

# Imported when asked for (PEP 562): these need Lightning, which takes seconds.
_LAZY = {
    "PolicyTrainer": "moslim.policy.module",
    "PreferenceDataModule": "moslim.data.module",
    "RewardClassifier": "moslim.reward.module",
    "SupervisedTrainer": "moslim.supervised.module",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moslim' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
