"""Engines that sample completions."""

from moslim.policy.engines import Completions, Decoding, ParityError, RolloutEngine, TorchEngine, VLLMEngine

__all__ = ["Completions", "Decoding", "ParityError", "RolloutEngine", "TorchEngine", "VLLMEngine"]
