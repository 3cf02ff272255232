"""Policy optimizers, one file each."""

from moslim.policy.optimizers.base import GroupScores, LossParts, PolicyOptimizer
from moslim.policy.optimizers.grpo import GRPO
from moslim.policy.optimizers.rloo import RLOO

__all__ = ["GRPO", "RLOO", "GroupScores", "LossParts", "PolicyOptimizer"]
