"""Classifies pairs of which several begin alike: with the same question, or with the same words of an answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moslim.reward.classifier import PreferenceClassifier, is_causal
from moslim.reward.pooling import pool
from moslim.tree import grow
from moslim.tree_attention import along, reads_trees


def can_share(classifier: PreferenceClassifier) -> bool:
    """Whether what pairs begin with can be computed once: the backbone looks back only, and reads trees."""
    return is_causal(classifier.config.backbone) and reads_trees(classifier.backbone, classifier.device)


def shared_features(classifier: PreferenceClassifier, ids: Tensor, lengths: Tensor, parts: Iterator[Tensor]) -> Tensor:
    """Pooled hidden states of pairs, as :meth:`PreferenceClassifier.features` gives them.

    Args:
        classifier: The classifier.
        ids: ``[N, T]`` pairs, right-padded, on its device.
        lengths: ``[N]`` how long they are.
        parts: Which of them share a forward pass, each in one of them.

    Returns:
        ``[N, H]``.
    """
    features, order = [], []
    for part in parts:
        own = lengths[part]
        tree = grow(ids[part, : int(own.max())], own)
        with along(classifier.backbone, tree) as inputs:
            nodes = classifier.states(**inputs)[0]
        mask = (torch.arange(tree.nodes.shape[1], device=ids.device) < own[:, None]).long()
        features.append(pool(nodes[tree.nodes], mask, classifier.config.pooling))
        order.append(part)
    return torch.cat(features)[torch.cat(order).argsort()]
