"""The tiny policy of tests/policy."""

from tests.helpers.policy_models import classifier, lm, preferences, tokenizer

__all__ = ["classifier", "lm", "preferences", "tokenizer"]
