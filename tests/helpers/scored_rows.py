"""Dimensions of the tests of the classifier's measures, and the type of their fixture ``rows``."""

from collections.abc import Callable

from moslim.evaluation.classifier_records import ScoredRows
from moslim.preferences import PreferenceSet

Rows = Callable[..., ScoredRows]
PREFERENCES = PreferenceSet({"two": ["no", "yes"], "three": ["a", "b", "c"]})
