"""What is logged of rollouts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moslim.levels import expected_level, requested_probability
from moslim.policy.kl import k1, k3
from moslim.policy.rollout import Rollout
from moslim.preferences import PreferenceSet


def progress_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """What the progress bar shows: mean reward of instructed answers, KL divergence in nats per answer."""
    metrics = {"train/reward": rollout.rewards[~rollout.per_dimension.isnan().all(dim=1)].mean()}
    if rollout.reference_logprobs is not None:
        kl = k1(rollout.old_logprobs, rollout.reference_logprobs) * rollout.mask
        metrics["train/kl"] = kl.sum(dim=1).mean()
    return {name: value for name, value in metrics.items() if not value.isnan()}


def rollout_metrics(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, Tensor]:
    """Further scalars by name; what has no value, because nothing asked for it, is left out.

    ``train/proxy`` is the mean probability that the classifier gives to the requested levels, ``train/gold`` the share
    of requested levels that the judge finds: the gap between them is how far the classifier is being fooled.
    ``train/entropy`` is estimated from the sampled tokens, whose mean negative log-probability it is.

    Args:
        rollout: ``N`` answers.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels that the judge found, for gold; None leaves it out.
    """
    metrics: dict[str, Tensor] = {
        "train/length": rollout.mask.sum(dim=1).float().mean(),  # tokens per answer
        "train/truncated": 1 - rollout.ended.float().mean(),
        "train/used": rollout.used.float().mean(),  # share of answers that take part in updates
        "train/entropy": -(rollout.old_logprobs * rollout.mask).sum() / rollout.mask.sum(),  # nats per token
    }
    if rollout.reference_logprobs is not None:
        per_token = k3(rollout.old_logprobs, rollout.reference_logprobs) * rollout.mask
        metrics["train/kl_k3"] = per_token.sum() / rollout.mask.sum()  # nats per token
    by_dimension = {"proxy": requested_probability(rollout.probs, rollout.targets)}
    if judged is not None:
        hit = (judged == rollout.targets).float()
        by_dimension["gold"] = hit.masked_fill((rollout.targets < 0) | judged.isnan(), torch.nan)
    metrics |= {f"train/{kind}": values.nanmean() for kind, values in by_dimension.items()}
    for kind, values in {"reward": rollout.per_dimension[:, : len(preferences)], **by_dimension}.items():
        per_dimension = zip(preferences.names, values.nanmean(dim=0), strict=True)
        metrics |= {f"train/{kind}/{name}": value for name, value in per_dimension}
    return {name: value for name, value in metrics.items() if not value.isnan()}


def level_offsets(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, float]:
    """How far the achieved levels lie above (+) or below (-) the requested one, in levels.

    Args:
        rollout: ``N`` answers.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels that the judge found; None takes those that the classifier expects.

    Returns:
        Mean by ``offset/{dimension}/{number of the requested level}``; a level that nothing asked for is left out.
    """
    targets, width = rollout.targets, rollout.probs.shape[-1]
    achieved = expected_level(rollout.probs) if judged is None else judged
    known = (targets >= 0) & ~achieved.isnan()
    asked = F.one_hot(targets.clamp(min=0), width) * known[..., None]  # [N, D, K]
    offsets = ((achieved - targets).nan_to_num()[..., None] * asked).sum(dim=0) / asked.sum(dim=0)  # 0 / 0 = NaN
    rows = zip(preferences.names, offsets.tolist(), strict=True)
    found = {f"offset/{name}/{level}": value for name, row in rows for level, value in enumerate(row)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def staleness_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Distance of the sampler from the policy; empty where they are the same."""
    if rollout.sampler_logprobs is None:
        return {}
    surplus = (rollout.old_logprobs - rollout.sampler_logprobs)[rollout.mask]
    return {
        "train/off_policy/staleness": surplus.new_tensor(rollout.staleness),
        "train/off_policy/kl": k3(-surplus, torch.zeros_like(surplus)).mean(),  # KL(sampler || policy), nats per token
    }
