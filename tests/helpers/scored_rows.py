"""Dimensions of the tests of the classifier's measures, and the type of their fixture ``rows``."""

from collections.abc import Callable

from moslim.preferences import PreferenceSet
from moslim.reward.evaluation.rows import ScoredRows

Rows = Callable[..., ScoredRows]
PREFERENCES = PreferenceSet({"two": ["no", "yes"], "three": ["a", "b", "c"]})
