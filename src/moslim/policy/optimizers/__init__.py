"""Policy optimizers, one file each."""

from moslim.policy.optimizers.base import GroupScores, LossParts, PolicyOptimizer, UpdateBatch
from moslim.policy.optimizers.grpo import GRPO
from moslim.policy.optimizers.online_dpo import OnlineDPO
from moslim.policy.optimizers.policy_gradient import PolicyGradient
from moslim.policy.optimizers.ppo import PPO
from moslim.policy.optimizers.reinforce_plus_plus import ReinforcePlusPlus
from moslim.policy.optimizers.rloo import RLOO

__all__ = [
    "GRPO",
    "PPO",
    "RLOO",
    "GroupScores",
    "LossParts",
    "OnlineDPO",
    "PolicyGradient",
    "PolicyOptimizer",
    "ReinforcePlusPlus",
    "UpdateBatch",
]
