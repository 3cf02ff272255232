"""Small tables that the tests of all optimizers compute with by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, LossInputs

MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, 0.0, 0.0]])
ADVANTAGES = torch.tensor([2.0, -1.0])
REDUCTIONS = ("grpo", "token_mean", "constant")


def scores(total: Any, per_dimension: Any = None, kl: Any = 0.0, penalty: Any = 0.0, **more: Any) -> AdvantageInputs:
    """Answers of two tokens, the whole KL on the first."""
    total = torch.tensor(total)
    filled = total[..., None] if per_dimension is None else torch.tensor(per_dimension)
    token_kl = torch.stack([torch.zeros_like(total) + torch.tensor(kl), torch.zeros_like(total)], dim=-1)
    mask = torch.ones_like(token_kl, dtype=torch.bool)
    return AdvantageInputs(total, filled, torch.zeros_like(total) + penalty, token_kl, mask, **more)


def batch(
    logprobs: Tensor,
    old_logprobs: Tensor = OLD,
    ref_logprobs: Tensor | None = None,
    advantages: Tensor = ADVANTAGES,
    mask: Tensor = MASK,
    max_completion_length: int = 5,
    num_generations: int = 1,
    **more: Any,
) -> LossInputs:
    """An update of the answers in the tables above."""
    return LossInputs(
        logprobs, old_logprobs, advantages, mask, max_completion_length, num_generations, ref_logprobs, **more
    )
