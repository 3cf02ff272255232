"""Rollouts of random tokens with given levels, on the embedded world."""

from __future__ import annotations

import torch

from moslim.policy.rollout import Rollout

QUESTION = "How do I clean the kettle?"


def rollout(levels: list[list[int]], probability: float = 0.9) -> Rollout:
    """``N <= 4`` completions, whose ``[N, 4]`` levels have the given probability."""
    n = len(levels)
    rest = (1 - probability) / 4
    probs = torch.full((n, 4, 5), rest).scatter_(2, torch.tensor(levels)[..., None], probability)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 60, (n, 9), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1])[:n, None]
    attention = torch.cat([torch.ones(n, 5, dtype=torch.long), mask.long()], dim=1)
    zeros = torch.zeros(n)
    return Rollout(
        key=(0, 3), input_ids=ids, attention_mask=attention, mask=mask, old_logprobs=zeros[:, None].expand(-1, 4),
        ref_logprobs=None, targets=torch.full((n, 4), -1), probs=probs, per_dimension=zeros[:, None], rewards=zeros,
        advantages=zeros, used=mask[:, 0], ended=torch.ones(n, dtype=torch.bool), questions=[QUESTION] * n,
        completion_texts=["a"] * n, version=0,
    )  # fmt: skip
