"""Policy optimizers, one file each, and controllers of the KL penalty."""

from moslim.policy.kl_controllers import AdaptiveKL, KLController
from moslim.policy.optimizers import (
    GRPO,
    PPO,
    RLOO,
    GroupScores,
    LossParts,
    OnlineDPO,
    PolicyGradient,
    PolicyOptimizer,
    ReinforcePlusPlus,
    UpdateBatch,
)

__all__ = [
    "GRPO",
    "PPO",
    "RLOO",
    "AdaptiveKL",
    "GroupScores",
    "KLController",
    "LossParts",
    "OnlineDPO",
    "PolicyGradient",
    "PolicyOptimizer",
    "ReinforcePlusPlus",
    "UpdateBatch",
]
