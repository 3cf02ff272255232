"""Engines that generate completions: :class:`TorchEngine` in this process, :class:`VLLMEngine` on servers."""

from moslim.generation.base import Completions, RolloutEngine
from moslim.generation.decoding import Decoding
from moslim.generation.torch_engine import TorchEngine
from moslim.generation.vllm_engine import ParityError, VLLMEngine

__all__ = ["Completions", "Decoding", "ParityError", "RolloutEngine", "TorchEngine", "VLLMEngine"]
