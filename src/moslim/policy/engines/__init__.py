"""What samples the answers."""

from moslim.policy.engines.base import Completions, RolloutEngine
from moslim.policy.engines.torch_engine import TorchEngine

__all__ = ["Completions", "RolloutEngine", "TorchEngine"]
