"""The tiny policy of tests/policy."""

from tests.helpers.policy_models import classifier, lm, models, preferences, prompts, tokenizer

__all__ = ["classifier", "lm", "models", "preferences", "prompts", "tokenizer"]
