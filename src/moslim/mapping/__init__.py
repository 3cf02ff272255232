"""Mapping functions: turn level probabilities and requested levels into rewards."""

from moslim.mapping.base import MappedReward, MappingFunction, RunningLevels
from moslim.mapping.distance import ExpectedDistance, Tchebycheff
from moslim.mapping.probability import LogProbability, TargetProbability
from moslim.mapping.scalarization import Constrained, LinearScalarization
from moslim.mapping.weighted import FittedWeights, UserWeights, Weighted

__all__ = [
    "Constrained",
    "ExpectedDistance",
    "FittedWeights",
    "LinearScalarization",
    "LogProbability",
    "MappedReward",
    "MappingFunction",
    "RunningLevels",
    "TargetProbability",
    "Tchebycheff",
    "UserWeights",
    "Weighted",
]
