"""Generation of completions from prompts, and options of off-policy completions.

The policy that sampled the completions (behavior policy) can differ from the policy at the start of the update (old
policy): its weights are older (:class:`~moslim.policy.rollout.CompletionSource`), top-k and top-p leave tokens out, or
another program rounds differently. The loss of each token or completion is then multiplied by the importance weight
``min(exp(old_logprobs - behavior_logprobs), importance_clip)`` (IMPALA, arXiv 1802.01561; TRL's
``vllm_importance_sampling_correction``). Probability ratios, clips and KL estimates use ``old_logprobs``.
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
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.numerics import derive_seed, nonfinite
from moslim.policy.policy_models import evaluating
from moslim.utils.errors import UsageError


class Purpose(IntEnum):
    """Purpose of a seed."""

    TRAIN = 0
    EVALUATE = 1
    PREDICT = 2
    SHUFFLE = 3
    HINDSIGHT = 4
    REHEARSE = 5


@dataclass
class Generations:
    """``N = B * n`` completions, those of one prompt adjacent.

    Args:
        completions: Tokens, masks and log-probabilities.
        input_ids: ``[N, P + T]`` prompts and completions.
        attention_mask: ``[N, P + T]``.
        questions: ``N`` questions without the instruction.
        texts: ``N`` decoded completions, without special tokens, stop strings and stop tokens.
    """

    completions: Completions
    input_ids: Tensor
    attention_mask: Tensor
    questions: list[Question]
    texts: list[str]


BatchKey = tuple[int, int]
"""A training batch of prompts: epoch, and batch number without repeats."""


def completion_seeds(keys: Sequence[Sequence[int]], samples: int, device: torch.device) -> Tensor:
    """``[B, n]`` seeds, one per completion, from the key of each of the ``B`` prompts and the completion's number."""
    seeds = [[derive_seed(*key, number) for number in range(samples)] for key in keys]
    return torch.tensor(seeds, dtype=torch.int64, device=device)


class CompletionGenerator:
    """Samples completions with a model and decodes them.

    Args:
        engine: Sampling engine.
        tokenizer: Tokenizer of the policy.
        eos_ids: Tokens that end a completion.

    Attributes:
        eos_ids: These, and the stop tokens of the engine.
        pad_id: Token that fills a completion after its end.
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
        """Generates completions of a batch of prompts.

        Args:
            model: Policy or reference.
            batch: ``B`` prompts.
            keys: ``B`` keys of the random numbers. A completion depends on its prompt, its key and its number (and on
                the batch, if the engine samples with ``multinomial``).
            samples: Completions per prompt, ``n``.
            finite: Whether NaN or infinite log-probabilities raise an error.

        Raises:
            UsageError: ``samples`` is below 1, or a log-probability is not finite.
        """
        if samples < 1:
            raise UsageError(f"samples is {samples}: give 1 or more")
        seeds = completion_seeds(keys, samples, batch.input_ids.device)
        with evaluating(model):
            completions = self.engine.sample(
                model, batch.input_ids, batch.attention_mask, seeds, self.eos_ids, self.pad_id
            )
        if finite and (reason := nonfinite("a log-probability", completions.logprobs[completions.mask])):
            raise UsageError(
                f"{reason} of sampled completions: the model's weights are damaged, take an earlier checkpoint"
            )
        prompts = batch.input_ids.repeat_interleave(samples, dim=0)
        prompt_mask = batch.attention_mask.repeat_interleave(samples, dim=0)
        tokens = completions.tokens.cpu()
        text_mask = completions.mask.cpu() & ~torch.isin(tokens, self._stop_ids)
        text_token_ids = [ids[keep].tolist() for ids, keep in zip(tokens, text_mask, strict=True)]
        texts = self.tokenizer.batch_decode(text_token_ids, skip_special_tokens=True)
        return Generations(
            completions,
            torch.cat([prompts, completions.tokens], dim=1),
            torch.cat([prompt_mask, completions.mask.to(prompt_mask.dtype)], dim=1),
            [question for question in batch.questions for _ in range(samples)],
            [self.engine.before_stop(text) for text in texts],
        )


OldLogprobs = Literal["auto", "recompute"]


@dataclass(frozen=True)
class OffPolicy:
    """Treatment of completions that another policy sampled.

    Args:
        importance_clip: Largest importance weight of a token or completion; None = no correction.
        old_logprobs: Source of ``old_logprobs`` after the first optimizer step on a rollout; in that first step they
            are those of its own forward pass. ``auto`` uses the log-probabilities by the engine if it had the current
            weights, and recomputes them in precision below float32. ``recompute`` always makes a forward pass, and
            corrects for the rounding of the engine.

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

    @property
    def corrects(self) -> bool:
        """Whether losses have importance weights."""
        return self.importance_clip is not None


def with_logprobs(completions: Completions, logprobs: Tensor) -> Completions:
    """The same completions with log-probabilities of the policy; those of the sampler become ``behavior_logprobs``.

    Args:
        completions: ``N`` completions.
        logprobs: ``[N, T]`` log-probabilities under the policy.
    """
    behavior_logprobs = completions.behavior_logprobs
    if behavior_logprobs is None:
        behavior_logprobs = completions.logprobs
    return replace(completions, logprobs=logprobs, behavior_logprobs=behavior_logprobs)


def rounded_anew(
    logprobs: Tensor, old_logprobs: Tensor, behavior_logprobs: Tensor | None, in_process: bool
) -> tuple[Tensor, Tensor | None]:
    """Replaces old log-probabilities by recomputed ones of the same weights.

    The effect of top-k and top-p, ``old_logprobs - behavior_logprobs``, is kept. Without it, the rounding of an engine
    in this process is ignored; the log-probabilities by another program become ``behavior_logprobs``, so that its
    deviation is corrected.

    Args:
        logprobs: ``[N, T]`` recomputed log-probabilities.
        old_logprobs: ``[N, T]`` log-probabilities that they replace.
        behavior_logprobs: ``[N, T]`` log-probabilities under the policy that sampled the tokens; None = that of
            ``old_logprobs``.
        in_process: Whether the engine samples with the policy's own weights in this process.

    Returns:
        The new ``old_logprobs`` and ``behavior_logprobs``.
    """
    if behavior_logprobs is None:
        return logprobs, None if in_process else old_logprobs
    return logprobs, logprobs - (old_logprobs - behavior_logprobs)


def reduced_precision(model: Any) -> bool:
    """Whether the forward passes of a model have a precision below float32, by its weights or by autocast."""
    return torch.is_autocast_enabled(model.device.type) or torch.finfo(model.dtype).eps > 1e-6


def with_old_logprobs(
    policy: Any,
    generations: Generations,
    engine: RolloutEngine,
    off_policy: OffPolicy,
    forward_config: ForwardConfig,
    staleness: int,
    several_steps: bool,
) -> tuple[Completions, Tensor | None]:
    """Recomputes log-probabilities where those of the engine cannot serve as ``old_logprobs``.

    Args:
        policy: The policy.
        generations: ``N`` completions.
        engine: Engine that sampled them.
        off_policy: Treatment of completions that another policy sampled.
        forward_config: Options of forward passes.
        staleness: Optimizer steps since the weights that sampled them.
        several_steps: Whether several optimizer steps are made with the rollout.

    Returns:
        The completions with ``old_logprobs`` as their ``logprobs``; and the log-probabilities by the engine, if the
        recomputed ones differ from them by rounding only, else None.
    """
    completions = generations.completions
    recompute = staleness > 0 or off_policy.old_logprobs == "recompute"
    if not recompute and not (several_steps and reduced_precision(policy)):
        return completions, None
    tokens = CompletionBatch(generations.input_ids, generations.attention_mask, completions.mask)
    logprobs = completion_logprobs(policy, tokens, engine.temperature, forward_config)
    if recompute:
        return with_logprobs(completions, logprobs), None
    engine_logprobs = completions.logprobs
    old, behavior = rounded_anew(logprobs, engine_logprobs, completions.behavior_logprobs, engine.in_process)
    return replace(completions, logprobs=old, behavior_logprobs=behavior), engine_logprobs
