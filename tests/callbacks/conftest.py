"""The tiny policy of tests/policy."""

from tests.policy.conftest import classifier, lm, preferences, tokenizer

__all__ = ["classifier", "lm", "preferences", "tokenizer"]
