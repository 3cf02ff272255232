"""Plain language-model fine-tuning: starter models and baselines."""
