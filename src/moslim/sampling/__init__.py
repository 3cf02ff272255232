"""Which preferences are asked for during training."""

from moslim.sampling.base import TRIES, PreferenceSampler, draw_levels
from moslim.sampling.curriculum import Curriculum
from moslim.sampling.error_weighted import ErrorWeighted
from moslim.sampling.uniform import Reachable, Uniform

__all__ = ["TRIES", "Curriculum", "ErrorWeighted", "PreferenceSampler", "Reachable", "Uniform", "draw_levels"]
