"""What is logged of every rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from moslim.evaluation.judges import Judge
from moslim.mapping.base import requested_probability
from moslim.policy.kl import k1, k3
from moslim.policy.rollout import Rollout
from moslim.preferences import PreferenceSet


def rollout_metrics(rollout: Rollout, preferences: PreferenceSet, judge: Judge | None) -> dict[str, Tensor]:
    """Scalars by name; what has no value, because nothing asked for it, is left out.

    ``train/proxy`` is the mean probability that the classifier gives to the requested levels, ``train/gold`` the share
    of requested levels that the judge finds: the gap between them is how far the classifier is being fooled.

    Args:
        rollout: ``N`` answers.
        preferences: The ``D`` dimensions.
        judge: Who measures gold; None leaves it out.
    """
    metrics: dict[str, Tensor] = {
        "train/reward": rollout.rewards[~rollout.per_dimension.isnan().all(dim=1)].mean(),
        "train/length": rollout.mask.sum(dim=1).float().mean(),  # tokens per answer
        "train/ended": rollout.ended.float().mean(),
        "train/used": rollout.used.float().mean(),  # share of answers that take part in updates
    }
    if rollout.reference_logprobs is not None:
        pair = (rollout.old_logprobs, rollout.reference_logprobs)
        metrics["train/kl"] = (k1(*pair) * rollout.mask).sum(dim=1).mean()  # nats per answer
        metrics["train/kl_k3"] = (k3(*pair) * rollout.mask).sum() / rollout.mask.sum()  # nats per token
    achieved = {"proxy": requested_probability(rollout.probs, rollout.targets)}
    if judge is not None:
        levels = judge.levels(rollout.questions, rollout.answers).to(rollout.targets.device)
        hit = (levels == rollout.targets).float()
        achieved["gold"] = hit.masked_fill((rollout.targets < 0) | levels.isnan(), torch.nan)
    for kind, values in achieved.items():
        metrics[f"train/{kind}"] = values.nanmean()
        per_dimension = zip(preferences.names, values.nanmean(dim=0), strict=True)
        metrics |= {f"train/{kind}/{name}": value for name, value in per_dimension}
    return {name: value for name, value in metrics.items() if not value.isnan()}
