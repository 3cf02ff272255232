"""Rehearsal: texts on which the policy is held close to the reference, so that it does not forget them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.prompts import pad, pad_id
from moslim.data.types import RowKind, Source, Split
from moslim.ops.chunked_linear import Predictor
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, plan
from moslim.ops.numerics import derive_seed
from moslim.policy.generation import Purpose
from moslim.policy.policy_models import PolicyModels
from moslim.preferences import PreferenceSet
from moslim.training.distributed import mean_over_processes, process_rank
from moslim.utils.errors import UsageError


@dataclass(frozen=True)
class Rehearsal:
    """Options of rehearsal: KL(policy || reference) on given texts is added to the loss.

    A policy forgets what its training prompts never touch. ``default_kl_coef`` preserves its behaviour on the training
    questions; rehearsal preserves it on other texts, which need no levels, as InstructGPT's pretraining mix does
    (arXiv 2203.02155, eq. 2), with the distribution of the reference in place of the given tokens.

    Args:
        source: Source of question-answer pairs; its training texts are used.
        kl_coef: Weight of the exact KL(policy || reference), mean over the tokens of the answers.
        batch_size: Texts per training step, per process.

    Raises:
        UsageError: An option is out of range.
    """

    source: Source
    kl_coef: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.kl_coef > 0 or self.batch_size < 1:
            raise UsageError(
                f"rehearsal.kl_coef is {self.kl_coef}, batch_size {self.batch_size}: give more than 0, or rehearsal: "
                "null for none"
            )

    def settings(self) -> dict[str, Any]:
        """Options by which results are compared."""
        return {"source": type(self.source).__name__, "kl_coef": self.kl_coef, "batch_size": self.batch_size}


class RehearsalTexts:
    """Batches of encoded texts.

    Args:
        options: Options.
        data: Data module of the run, which encodes texts as prompts without an instruction.
        preferences: Dimensions in use.
        seed: Seed of the source and of the draws.
        padding: Id that fills prompts and answers.

    Raises:
        UsageError: The source has no texts with an answer.
    """

    def __init__(self, options: Rehearsal, data: Any, preferences: PreferenceSet, seed: int, padding: int) -> None:
        self.options = options
        self._seed, self._padding = seed, padding
        rows = [
            row for row in options.source.rows(RowKind.TEXTS, Split.TRAIN, preferences, seed) if row.answer is not None
        ]
        if not rows:
            raise UsageError(
                f"rehearsal.source, {type(options.source).__name__}, has no training rows with question and answer"
            )
        self._spans: list[tuple[list[int], list[int]]] = data.pair_encoder(data.token_limit).many_spans(
            [row.question for row in rows], [row.answer or "" for row in rows]
        )

    def batch(self, key: Sequence[int], device: torch.device) -> CompletionBatch:
        """Draws the texts of a training step.

        Args:
            key: Epoch and number of the step.
            device: Device of the tensors.
        """
        generator = random.Random(derive_seed(self._seed, Purpose.REHEARSE, *key, process_rank()))
        spans = generator.choices(self._spans, k=self.options.batch_size)
        prompts, prompt_mask = pad([prompt for prompt, _ in spans], self._padding, left=True)
        answers, answer_mask = pad([answer for _, answer in spans], self._padding, left=False)
        return CompletionBatch(
            torch.cat([prompts, answers], dim=1).to(device),
            torch.cat([prompt_mask, answer_mask], dim=1).to(device),
            answer_mask.bool().to(device),
        )


def rehearsal_texts(
    options: Rehearsal | None, data: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> RehearsalTexts | None:
    """Encodes the texts of a run; None without options. See :class:`RehearsalTexts`."""
    return None if options is None else RehearsalTexts(options, data, data.preferences, seed, pad_id(tokenizer))


def rehearsal_kl(
    models: PolicyModels, batch: CompletionBatch, temperature: float, forward_config: ForwardConfig
) -> Tensor:
    """Exact KL(policy || reference), mean over the answer tokens of all processes: a scalar with gradient.

    Args:
        models: Policy and reference.
        batch: Texts.
        temperature: Temperature of both distributions.
        forward_config: Options of forward passes.
    """
    predictor = Predictor(models.policy, forward_config.chunked_logprobs)
    passes = plan(models.policy, batch, forward_config)
    ref_states = models.reference_states(passes, forward_config)
    total = torch.zeros((), dtype=predictor.dtype, device=batch.mask.device)
    for forward_pass, ref_state in zip(passes, ref_states, strict=True):
        statistics = predictor.statistics(
            forward_pass.states(predictor), forward_pass.tokens, temperature, ref_state=ref_state
        )
        if statistics.kl is not None:
            total = total + forward_pass.spread(statistics.kl).sum()
    return total / mean_over_processes(batch.mask.sum())
