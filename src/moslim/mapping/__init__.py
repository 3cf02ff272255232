"""Mapping functions: from level probabilities and requested levels to reward."""

from moslim.data.samplers import RunningLevels
from moslim.mapping.base import MappedReward, MappingFunction
from moslim.mapping.constrained import Constrained
from moslim.mapping.distance import ExpectedDistance, Tchebycheff
from moslim.mapping.linear_scalarization import LinearScalarization
from moslim.mapping.probability import LogProbability, TargetProbability
from moslim.mapping.weighted import TasteWeights, UserWeights, Weighted

__all__ = [
    "Constrained",
    "ExpectedDistance",
    "LinearScalarization",
    "LogProbability",
    "MappedReward",
    "MappingFunction",
    "RunningLevels",
    "TargetProbability",
    "TasteWeights",
    "Tchebycheff",
    "UserWeights",
    "Weighted",
]
