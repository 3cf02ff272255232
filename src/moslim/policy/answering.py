"""From prompts to texts: sampling, and the seeds that make every answer a function of what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.prompts import pad_id
from moslim.data.types import PromptBatch, Question
from moslim.errors import UsageError
from moslim.noise import derive_seed
from moslim.policy.engines import Completions, RolloutEngine
from moslim.policy.roles import evaluating
from moslim.precision import nonfinite


class Purpose(IntEnum):
    """What a seed is for."""

    TRAIN = 0
    EVALUATE = 1
    PREDICT = 2
    SHUFFLE = 3


@dataclass
class Answers:
    """``N = B * n`` answers, those of one prompt adjacent.

    Args:
        completions: The tokens.
        input_ids: ``[N, P + T]`` prompts and answers.
        attention_mask: ``[N, P + T]``.
        questions: ``N`` questions without the instruction.
        texts: ``N`` decoded answers, without special tokens, stop strings and stop tokens.
    """

    completions: Completions
    input_ids: Tensor
    attention_mask: Tensor
    questions: list[Question]
    texts: list[str]


BatchKey = tuple[int, int]
"""A training batch of prompts: epoch, and batch number not counting repeats."""


def answer_seeds(keys: Sequence[Sequence[int]], samples: int, device: torch.device) -> Tensor:
    """One seed per answer ``[B, n]``, from what identifies each of the ``B`` prompts and the sample's number."""
    rows = [[derive_seed(*key, sample) for sample in range(samples)] for key in keys]
    return torch.tensor(rows, dtype=torch.int64, device=device)


class Answerer:
    """Samples answers with a model and decodes them. ``eos_ids`` are all tokens that end one, ``pad_id`` follows them.

    Args:
        engine: What samples.
        tokenizer: The policy's.
        eos_ids: Tokens that end an answer.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, eos_ids: list[int]) -> None:
        self.engine = engine
        engine.bind(tokenizer)
        self.tokenizer = tokenizer
        self.eos_ids = sorted({*eos_ids, *engine.stop_ids})
        self._stop_ids = torch.tensor(engine.stop_ids, dtype=torch.long)
        self.pad_id = pad_id(tokenizer)

    def __call__(
        self, model: Any, batch: PromptBatch, keys: Sequence[Sequence[int]], samples: int, finite: bool = True
    ) -> Answers:
        """Answers a batch of prompts.

        Args:
            model: The policy or its reference.
            batch: ``B`` prompts.
            keys: What identifies each of them; an answer depends on its prompt, its key and its number (and
                where the engine draws by ``multinomial``, on the batch).
            samples: Answers per prompt, ``n``.
            finite: Whether to refuse answers of a model that gives no numbers.

        Raises:
            UsageError: No answer is asked for, or a log-probability is not finite.
        """
        if samples < 1:
            raise UsageError(f"samples is {samples}: give 1 or more")
        seeds = answer_seeds(keys, samples, batch.input_ids.device)
        with evaluating(model):
            found = self.engine.sample(model, batch.input_ids, batch.attention_mask, seeds, self.eos_ids, self.pad_id)
        if finite and (reason := nonfinite("a log-probability", found.logprobs[found.mask])):
            raise UsageError(
                f"{reason} of sampled answers: the model's weights are damaged, take an earlier checkpoint"
            )
        prompts = batch.input_ids.repeat_interleave(samples, dim=0)
        prompt_mask = batch.attention_mask.repeat_interleave(samples, dim=0)
        tokens = found.tokens.cpu()
        said = found.mask.cpu() & ~torch.isin(tokens, self._stop_ids)
        spoken = [row[keep].tolist() for row, keep in zip(tokens, said, strict=True)]
        return Answers(
            found,
            torch.cat([prompts, found.tokens], dim=1),
            torch.cat([prompt_mask, found.mask.to(prompt_mask.dtype)], dim=1),
            [question for question in batch.questions for _ in range(samples)],
            [self.engine.before_stop(text) for text in self.tokenizer.batch_decode(spoken, skip_special_tokens=True)],
        )
