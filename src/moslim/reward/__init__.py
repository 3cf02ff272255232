"""The multi-head reward classifier: model, losses, metrics, training and scoring."""
