"""Hindsight relabelling: completions as examples of the levels that they have, whatever was requested."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.prompts import PromptRenderer, pad, pad_id
from moslim.data.samplers import PreferenceSampler
from moslim.data.types import Source
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.numerics import derive_seed
from moslim.policy.generation import Purpose
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rollout import Rollout
from moslim.preferences import Preference, PreferenceSet
from moslim.training.distributed import mean_over_processes
from moslim.utils.errors import UsageError

TRIES = 10
"""Most draws of dimensions per completion."""


@dataclass(frozen=True)
class Hindsight:
    """Options of hindsight relabelling (HIR, arXiv 2302.05206, after HER, arXiv 1707.01495).

    Some completions of a rollout get a second prompt, which requests the levels that the classifier finds in them, on
    dimensions that the sampler of preferences draws. The loss is increased by ``coef`` times the mean negative
    log-likelihood of their tokens after this prompt. So a completion that misses its request still shows what another
    request looks like, and no further sampling is needed. Combinations that the source holds out or calls unreachable
    are never requested.

    There is no importance weight: every completion with the requested levels is a valid example, whatever prompt it was
    sampled for. The examples are those of the policy as it is, so end the term by ``decay_steps`` and let the reward
    alone decide in the end.

    Args:
        coef: Weight of the negative log-likelihood per token, at the first step.
        num_completions: Completions per prompt that are relabelled.
        decay_steps: Optimizer steps in which the weight decreases linearly to 0; None = constant weight.
        min_probability: Least probability of each level under the classifier; completions with less certain levels are
            not relabelled.

    Raises:
        UsageError: An option is out of range.
    """

    coef: float = 1.0
    num_completions: int = 4
    decay_steps: int | None = None
    min_probability: float = 0.5

    def __post_init__(self) -> None:
        if not self.coef > 0:
            raise UsageError(f"hindsight.coef is {self.coef}: give more than 0, or hindsight: null for no relabelling")
        if self.num_completions < 1 or (self.decay_steps is not None and self.decay_steps < 1):
            raise UsageError(
                f"hindsight.num_completions is {self.num_completions}, decay_steps {self.decay_steps}: give 1 or more"
            )
        if not 0 <= self.min_probability < 1:
            raise UsageError(f"hindsight.min_probability is {self.min_probability}: give 0 or more, less than 1")

    def weight(self, step: int) -> float:
        """Weight of the term after ``step`` optimizer steps."""
        if self.decay_steps is None:
            return self.coef
        return self.coef * max(0.0, 1 - step / self.decay_steps)


@dataclass
class HindsightRelabeler:
    """Writes prompts that request the levels which completions have.

    Args:
        options: Options.
        renderer: Renderer of the training prompts.
        sampler: Sampler of preferences, which draws the dimensions to name.
        source: Source of the prompts, which knows reachable and held-out preferences.
        preferences: ``D`` dimensions.
    """

    options: Hindsight
    renderer: PromptRenderer
    sampler: PreferenceSampler
    source: Source
    preferences: PreferenceSet

    def relabel(self, rollout: Rollout, index: Sequence[int], seed: int) -> None:
        """Gives completions of a rollout their second prompts, ``hindsight_ids`` and ``hindsight_mask``.

        Nothing is done once the weight of the loss term is 0.

        Args:
            rollout: ``N`` completions; those of one prompt are adjacent.
            index: Rows of the source of the ``G`` prompts.
            seed: Seed of the draws, beside rollout, row and completion.
        """
        if self.options.weight(rollout.version or 0) == 0:
            return
        samples = len(rollout) // len(index)
        ended = rollout.ended.tolist()
        probabilities, levels = (values.tolist() for values in rollout.probs.max(dim=-1))
        prompts: list[list[int]] = []
        for i, question in enumerate(rollout.questions):
            prompt, number = divmod(i, samples)
            preference = None
            if ended[i] and number < self.options.num_completions:
                generator = random.Random(derive_seed(seed, Purpose.HINDSIGHT, *rollout.key, index[prompt], number))
                preference = self.preference(levels[i], probabilities[i], generator)
            prompts.append([] if preference is None else self.renderer.ids(question, preference))
        padding = pad_id(self.renderer.tokenizer)
        ids, mask = pad([prompt or [padding] for prompt in prompts], padding, left=True)
        mask[[not prompt for prompt in prompts]] = 0
        rollout.hindsight_ids, rollout.hindsight_mask = ids.to(rollout.probs.device), mask.to(rollout.probs.device)

    def preference(
        self, levels: Sequence[int], probabilities: Sequence[float], generator: random.Random
    ) -> Preference | None:
        """Draws the request that a completion is an example of; None if no draw is allowed.

        Args:
            levels: ``D`` most probable levels.
            probabilities: Their probabilities.
            generator: Random generator.
        """
        certain = {
            name: level
            for name, level, probability in zip(self.preferences.names, levels, probabilities, strict=True)
            if probability >= self.options.min_probability
        }
        for _ in range(TRIES):
            drawn = self.sampler.draw(self.preferences, generator, self.source).levels
            if drawn and certain.keys() >= drawn.keys():
                preference = Preference({name: certain[name] for name in drawn})
                if self.source.reachable(preference) and not self.source.held_out(preference):
                    return preference
        return None


def relabeler(options: Hindsight | None, data: Any, tokenizer: PreTrainedTokenizerBase) -> HindsightRelabeler | None:
    """Builds the relabeler of a run; None without options.

    Args:
        options: Options of relabelling.
        data: Data module of the run.
        tokenizer: Tokenizer of the policy.

    Raises:
        UsageError: The data module has no sampler of preferences, or no source.
    """
    if options is None:
        return None
    sampler, source = getattr(data, "sampler", None), getattr(data, "source", None)
    if not isinstance(sampler, PreferenceSampler) or not isinstance(source, Source):
        raise UsageError(
            "model.hindsight writes prompts for completions, which needs a PreferenceDataModule as trainer.datamodule: "
            "give one, or hindsight: null"
        )
    return HindsightRelabeler(options, data.renderer(tokenizer), sampler, source, data.preferences)


def hindsight_loss(
    models: PolicyModels,
    minibatch: Rollout,
    together: Sequence[Rollout],
    temperature: float,
    forward_config: ForwardConfig,
    loss_scale: float,
) -> Tensor | None:
    """Mean negative log-likelihood per token of the relabelled completions after their second prompts.

    Args:
        models: The policy is used.
        minibatch: ``N`` completions.
        together: All minibatches of the rollout that make one optimizer step, ``minibatch`` included.
        temperature: Sampling temperature.
        forward_config: Options of forward passes.
        loss_scale: Factor of the loss, see :func:`~moslim.policy.update.rollout_batches`.

    Returns:
        The share of this minibatch, a scalar with gradient: its mean over processes and minibatches is the mean over
        all tokens. None if nothing is relabelled in any process.
    """
    if minibatch.hindsight_ids is None or minibatch.hindsight_mask is None:
        return None
    counts = [part.mask[part.hindsight_mask.any(dim=1)].sum() for part in together if part.hindsight_mask is not None]
    tokens = mean_over_processes(torch.stack(counts).sum()) / loss_scale
    if not tokens > 0:
        return None
    relabelled = minibatch.hindsight_mask.any(dim=1)
    batch = CompletionBatch(
        torch.cat([minibatch.hindsight_ids, minibatch.tokens], dim=1)[relabelled],
        torch.cat([minibatch.hindsight_mask, minibatch.mask.to(minibatch.hindsight_mask.dtype)], dim=1)[relabelled],
        minibatch.mask[relabelled],
    )
    return -completion_logprobs(models.policy, batch, temperature, forward_config).sum() / tokens
