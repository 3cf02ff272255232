"""Do the trainer and an engine that runs elsewhere hold the same policy?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moslim.packing import AnswerBatch
from moslim.policy.engines.base import Completions
from moslim.policy.logprobs import answer_logprobs
from moslim.policy.passes import Passes


def logprob_difference(
    model: Any, input_ids: Tensor, attention_mask: Tensor, found: Completions, rows: Tensor, temperature: float
) -> float:
    """Largest absolute difference between an engine's log-probabilities and those of a forward pass here.

    Args:
        model: The policy, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        found: The engine's ``N = B * n`` answers, those of one prompt adjacent.
        rows: ``[R]`` the answers to compare.
        temperature: The sampler's; 0 (greedy) is taken as 1.

    Returns:
        A number; NaN where either side gave one.
    """
    owners = rows // (len(found.tokens) // len(input_ids))
    tokens, mask = found.tokens[rows], found.mask[rows]
    ids = torch.cat([input_ids[owners], tokens], dim=1)
    attention = torch.cat([attention_mask[owners], mask.to(attention_mask.dtype)], dim=1)
    own = answer_logprobs(model, AnswerBatch(ids, attention, mask), temperature, Passes(share_prefixes="never"))
    return float((own - found.logprobs[rows])[mask].abs().max())
