"""From prompts to texts: sampling, and the seeds that make every answer a function of what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moslim.data.types import PromptBatch, Question
from moslim.noise import derive_seed
from moslim.policy.engines import Completions, RolloutEngine


@dataclass
class Answers:
    """``N = B * n`` answers, those of one prompt adjacent.

    Args:
        completions: The tokens.
        input_ids: ``[N, P + T]`` prompts and answers.
        attention_mask: ``[N, P + T]``.
        questions: ``N`` questions without the instruction.
        texts: ``N`` decoded answers, without special tokens.
    """

    completions: Completions
    input_ids: Tensor
    attention_mask: Tensor
    questions: list[Question]
    texts: list[str]


def answer_seeds(keys: Sequence[Sequence[int]], samples: int, device: torch.device) -> Tensor:
    """One seed per answer ``[B, n]``, from what identifies each of the ``B`` prompts and the sample's number."""
    rows = [[derive_seed(*key, sample) for sample in range(samples)] for key in keys]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def answer(
    engine: RolloutEngine,
    model: nn.Module | Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    seeds: Tensor,
    eos_ids: list[int],
    pad_id: int,
) -> Answers:
    """Samples answers to a batch of prompts and decodes them.

    Args:
        engine: What samples.
        model: The policy or its reference, in eval mode.
        tokenizer: The policy's.
        batch: ``B`` prompts.
        seeds: ``[B, n]``, see :func:`answer_seeds`.
        eos_ids: Tokens that end an answer.
        pad_id: Token to put after the end.
    """
    samples = seeds.shape[1]
    completions = engine.sample(model, batch.input_ids, batch.attention_mask, seeds, eos_ids, pad_id)
    prompts = batch.input_ids.repeat_interleave(samples, dim=0)
    prompt_mask = batch.attention_mask.repeat_interleave(samples, dim=0)
    return Answers(
        completions,
        torch.cat([prompts, completions.tokens], dim=1),
        torch.cat([prompt_mask, completions.mask.to(prompt_mask.dtype)], dim=1),
        [question for question in batch.questions for _ in range(samples)],
        tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(completions.tokens, completions.mask, strict=True)],
            skip_special_tokens=True,
        ),
    )
