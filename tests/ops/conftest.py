"""The tiny models of the policy's tests as fixtures."""

from tests.helpers.policy_models import classifier, lm, models, preferences, prompts, tokenizer

__all__ = ["classifier", "lm", "models", "preferences", "prompts", "tokenizer"]
