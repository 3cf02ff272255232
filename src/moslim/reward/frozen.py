"""A classifier's backbone as something that turns texts into features and learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moslim.data.prompts import pad
from moslim.errors import UsageError
from moslim.ops.transformers_compat import own_settings
from moslim.packing import like_length, pass_tokens
from moslim.reward.classifier import PreferenceClassifier
from moslim.reward.features import FeatureCache, Ids, backbone_key


def resolve_freeze(freeze: bool | None, extends: bool, adapts: bool) -> bool:
    """Returns whether the backbone is frozen.

    Args:
        freeze: What the run says; None = it follows from the rest.
        extends: Whether heads are added to a saved classifier.
        adapts: Whether the backbone gets low-rank adapters.

    Raises:
        UsageError: A backbone that must stay as it is would be trained.
    """
    if extends and freeze is False:
        raise UsageError(
            "model.extend leaves the backbone as it is, for the old heads: leave model.freeze_backbone out"
        )
    if adapts and (extends or freeze):
        raise UsageError("model.lora trains the backbone, which is frozen here: set model.lora to null")
    return extends or bool(freeze)


def cached_features(
    classifier: PreferenceClassifier, pad_id: int, folder: Path, trainer: Trainer, rows: Sequence[Ids]
) -> Tensor:
    """Features of texts; the first process of a machine makes and saves what is missing, the others read it.

    Args:
        classifier: The classifier.
        pad_id: What stands on padding.
        folder: Where features are kept.
        trainer: The run's Trainer, all of whose processes must ask.
        rows: Token ids of ``N`` texts.

    Returns:
        ``[N, H]`` float32 or finer, on the CPU.
    """
    config = classifier.config
    settings = sorted(own_settings(config.backbone).items()), config.pooling, config.layer, str(trainer.precision)
    key = backbone_key(classifier.backbone, *settings)

    def run() -> Tensor:
        with trainer.precision_plugin.forward_context():
            return run_backbone(classifier, rows, pad_id)

    cache = FeatureCache(folder, key)
    if trainer.local_rank > 0:
        trainer.strategy.barrier("features")
    features = cache(rows, run)
    if trainer.local_rank == 0:
        trainer.strategy.barrier("features")
    return features


@torch.no_grad()
def run_backbone(classifier: PreferenceClassifier, rows: Sequence[Ids], pad_id: int) -> Tensor:
    """Runs the backbone once over texts, without dropout.

    Args:
        classifier: The classifier.
        rows: Token ids of ``N`` texts.
        pad_id: What stands on padding.

    Returns:
        ``[N, H]`` float32 or finer, on the CPU, in the order of the rows.
    """
    training = classifier.backbone.training
    classifier.backbone.eval()
    device = classifier.device
    features = torch.empty(0)
    # Nothing is kept for a backward pass: there is room for twice as many tokens.
    for chosen in like_length(list(map(len, rows)), 2 * pass_tokens(device)):
        ids, mask = pad([rows[i] for i in chosen], pad_id, left=False)
        found = classifier.features(ids.to(device), mask.to(device)).cpu()
        if not len(features):
            features = found.new_empty(len(rows), found.shape[1])
        features[chosen] = found
    classifier.backbone.train(training)
    return features
