"""Mapping functions: from level probabilities and requested levels to reward."""

from moslim.mapping.base import MappedReward, MappingFunction
from moslim.mapping.constrained import Constrained
from moslim.mapping.expected_distance import ExpectedDistance
from moslim.mapping.linear_scalarization import LinearScalarization
from moslim.mapping.log_probability import LogProbability
from moslim.mapping.target_probability import TargetProbability
from moslim.mapping.taste import Taste, TasteWeights
from moslim.mapping.tchebycheff import Tchebycheff
from moslim.mapping.weighted import Weighted
from moslim.running import RunningLevels

__all__ = [
    "Constrained",
    "ExpectedDistance",
    "LinearScalarization",
    "LogProbability",
    "MappedReward",
    "MappingFunction",
    "RunningLevels",
    "TargetProbability",
    "Taste",
    "TasteWeights",
    "Tchebycheff",
    "Weighted",
]
