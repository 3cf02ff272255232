"""Classifies pairs of which several begin alike: with the same question, or with the same words of an answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moslim.loading import is_causal
from moslim.reward.classifier import PreferenceClassifier
from moslim.reward.pooling import pool
from moslim.tree import Sequences
from moslim.tree_attention import along, reads_trees


def can_share(classifier: PreferenceClassifier) -> bool:
    """Whether what pairs begin with can be computed once: the backbone looks back only, and reads trees."""
    return is_causal(classifier.config.backbone) and reads_trees(classifier.backbone, classifier.device)


def shared_features(classifier: PreferenceClassifier, parts: Iterator[Sequences]) -> Tensor:
    """Pooled hidden states of ``N`` pairs, as :meth:`PreferenceClassifier.features` gives them.

    Args:
        classifier: The classifier.
        parts: The pairs, on its device; those that share a forward pass together.

    Returns:
        ``[N, H]``.
    """
    features, order = [], []
    for part in parts:
        tree = part.tree()
        with along(classifier.backbone, tree) as inputs:
            nodes = classifier.states(**inputs)[0]
        mask = (torch.arange(tree.nodes.shape[1], device=nodes.device) < part.lengths[:, None]).long()
        features.append(pool(nodes[tree.nodes], mask, classifier.config.pooling))
        order.append(part.order)
    return torch.cat(features)[torch.cat(order).argsort()]
