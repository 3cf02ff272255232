"""Generation of completions for prompts, and options of off-policy completions.

From prompts to texts: sampling, and the seeds that make every answer a function of what it answers.

Answers that were not drawn from the policy that learns from them: what it does about that, and how it is measured.

The sampler's weights may be older (a :class:`~moslim.policy.rollout.CompletionSource`), top-k and top-p leave tokens
out, and another program rounds in another way. Each token's, or answer's, part of the loss is then weighted by the
ratio of its probabilities under policy and sampler, truncated from above (IMPALA, arXiv 1802.01561; TRL calls it
``vllm_importance_sampling``). Probability ratios, clips and KL estimates go on comparing with the policy at the start
of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.prompts import pad_id
from moslim.data.types import PromptBatch, Question
from moslim.generation.base import Completions, RolloutEngine
from moslim.ops.numerics import derive_seed, nonfinite
from moslim.policy.policy_models import evaluating
from moslim.utils.errors import UsageError


class Purpose(IntEnum):
    """What a seed is for."""

    TRAIN = 0
    EVALUATE = 1
    PREDICT = 2
    SHUFFLE = 3


@dataclass
class Generations:
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


def completion_seeds(keys: Sequence[Sequence[int]], samples: int, device: torch.device) -> Tensor:
    """One seed per answer ``[B, n]``, from what identifies each of the ``B`` prompts and the sample's number."""
    rows = [[derive_seed(*key, sample) for sample in range(samples)] for key in keys]
    return torch.tensor(rows, dtype=torch.int64, device=device)


class CompletionGenerator:
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
    ) -> Generations:
        """Generations a batch of prompts.

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
        seeds = completion_seeds(keys, samples, batch.input_ids.device)
        with evaluating(model):
            found = self.engine.sample(model, batch.input_ids, batch.attention_mask, seeds, self.eos_ids, self.pad_id)
        if finite and (reason := nonfinite("a log-probability", found.logprobs[found.mask])):
            raise UsageError(
                f"{reason} of sampled answers: the model's weights are damaged, take an earlier checkpoint"
            )
        prompts = batch.input_ids.repeat_interleave(samples, dim=0)
        prompt_mask = batch.attention_mask.repeat_interleave(samples, dim=0)
        tokens = found.tokens.cpu()
        text_mask = found.mask.cpu() & ~torch.isin(tokens, self._stop_ids)
        text_token_ids = [row[keep].tolist() for row, keep in zip(tokens, text_mask, strict=True)]
        return Generations(
            found,
            torch.cat([prompts, found.tokens], dim=1),
            torch.cat([prompt_mask, found.mask.to(prompt_mask.dtype)], dim=1),
            [question for question in batch.questions for _ in range(samples)],
            [
                self.engine.before_stop(text)
                for text in self.tokenizer.batch_decode(text_token_ids, skip_special_tokens=True)
            ],
        )


OldLogprobs = Literal["auto", "recompute"]


@dataclass(frozen=True)
class OffPolicy:
    """What is done about answers that another policy sampled.

    Args:
        importance_clip: Largest weight of a token or answer by which its part of the loss is corrected; None corrects
            nothing.
        old_logprobs: What probability ratios compare with after the first optimizer step on a rollout; before it, the
            policy is compared with itself. ``auto`` takes the engine's log-probabilities wherever it had the current
            weights, but makes a forward pass for them where numbers are rounded to fewer digits than float32 has;
            ``recompute`` always does, and corrects for the engine's rounding.

    Raises:
        UsageError: An option is out of range.
    """

    importance_clip: float | None = 2.0
    old_logprobs: OldLogprobs = "auto"

    def __post_init__(self) -> None:
        if self.importance_clip is not None and not self.importance_clip >= 1:
            raise UsageError(
                f"off_policy.importance_clip is {self.importance_clip}: give 1 or more, or null for no correction"
            )
        if self.old_logprobs not in get_args(OldLogprobs):
            raise UsageError(f"off_policy.old_logprobs is '{self.old_logprobs}': give 'auto' or 'recompute'")


def with_logprobs(found: Completions, logprobs: Tensor) -> Completions:
    """The same answers as the policy sees them; what they were drawn from is kept beside.

    Args:
        found: ``N`` answers of a sampler.
        logprobs: ``[N, T]`` under the policy that is about to learn.
    """
    sampler = found.logprobs if found.behavior_logprobs is None else found.behavior_logprobs
    return replace(found, logprobs=logprobs, behavior_logprobs=sampler)


def rounded_anew(
    logprobs: Tensor, old: Tensor, sampler: Tensor | None, in_process: bool
) -> tuple[Tensor, Tensor | None]:
    """Puts log-probabilities of another computation by the same weights in the place of earlier ones.

    What top-k and top-p made of the distribution is kept as the sampler measured it. The rounding of an engine in this
    process is taken for none; that of another program is corrected, as it may be more than rounding.

    Args:
        logprobs: ``[N, T]``, the new ones.
        old: ``[N, T]``, the earlier ones.
        sampler: ``[N, T]``, under what the tokens were drawn from; None = what ``old`` is of.
        in_process: Whether the engine computes with the policy itself.

    Returns:
        The new old log-probabilities, and those of the sampler.
    """
    if sampler is None:
        return logprobs, None if in_process else old
    return logprobs, logprobs - (old - sampler)


def reduced_precision(model: Any) -> bool:
    """Whether a model's passes round to fewer digits than float32 has, by its weights or by autocast."""
    return torch.is_autocast_enabled(model.device.type) or torch.finfo(model.dtype).eps > 1e-6
