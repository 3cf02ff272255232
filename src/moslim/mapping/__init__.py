"""Mapping functions: from level probabilities and requested levels to reward."""

from moslim.mapping.base import MappedReward, MappingFunction
from moslim.mapping.expected_distance import ExpectedDistance
from moslim.mapping.target_probability import TargetProbability

__all__ = ["ExpectedDistance", "MappedReward", "MappingFunction", "TargetProbability"]
