"""Algorithms (policy optimizers), one file each, and controllers of the KL penalty."""

from moslim.algorithms.base import AdvantageInputs, LossInputs, LossOutput, PolicyGradient, PolicyOptimizer
from moslim.algorithms.functional import AdaptiveKL, CriticOptions, KLController
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO

__all__ = [
    "GRPO",
    "PPO",
    "RLOO",
    "AdaptiveKL",
    "AdvantageInputs",
    "CriticOptions",
    "KLController",
    "LossInputs",
    "LossOutput",
    "OnlineDPO",
    "PolicyGradient",
    "PolicyOptimizer",
    "ReinforcePlusPlus",
]
