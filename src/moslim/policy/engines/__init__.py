"""What samples the answers."""

from moslim.policy.engines.base import Completions, RolloutEngine
from moslim.policy.engines.decoding import Decoding
from moslim.policy.engines.torch_engine import TorchEngine
from moslim.policy.engines.vllm_engine import ParityError, VLLMEngine

__all__ = ["Completions", "Decoding", "ParityError", "RolloutEngine", "TorchEngine", "VLLMEngine"]
