"""Rollouts: completions to a batch of prompts, their rewards and advantages, and the collector that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moslim.algorithms.base import AdvantageInputs, PolicyOptimizer
from moslim.algorithms.functional import k1
from moslim.data.samplers import PreferenceSampler
from moslim.data.types import PromptBatch, Question
from moslim.generation.base import Completions
from moslim.mapping.base import MappedReward, MappingFunction
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.numerics import derive_seed, full_precision, nonfinite
from moslim.policy.generation import (
    BatchKey,
    CompletionGenerator,
    Generations,
    OffPolicy,
    Purpose,
    reduced_precision,
    rounded_anew,
    with_logprobs,
)
from moslim.policy.policy_models import PolicyModels
from moslim.policy.reward_functions import RewardFunctions
from moslim.training.base_module import Stopwatch
from moslim.training.distributed import any_process, of_all_processes, process_count, process_rank
from moslim.utils.errors import UsageError


@dataclass
class Rollout:
    """``N = G * n`` answers to ``G`` prompts, those of one prompt adjacent.

    Args:
        key: Which training batch it was sampled for: epoch, and batch number not counting repeats.
        input_ids: ``[N, P + T]``, prompts left-padded, answers right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, answer tokens up to and including the end-of-sequence token.
        old_logprobs: ``[N, T]`` float32 or finer, as all that follows; under the policy when it began to learn from
            them; 0 where masked.
        ref_logprobs: ``[N, T]``, or None where no KL is asked for.
        targets: ``[N, D]`` int64, requested levels, -1 = not mentioned.
        probs: ``[N, D, K]``, the classifier's level probabilities.
        per_dimension: ``[N, D + F]`` rewards of the dimensions, then of the reward functions, NaN where inactive.
        rewards: ``[N]`` total rewards.
        advantages: ``[N]`` or ``[N, T]``, as the policy optimizer gives them.
        used: ``[N]`` bool, whether an answer takes part in updates.
        ended: ``[N]`` bool, false where the answer was cut at the length limit.
        questions: ``N`` questions as the classifier saw them.
        answers: ``N`` decoded answers.
        values: ``[N, T]`` the critic's, 0 where masked; None without a critic.
        returns: ``[N, T]`` what the critic is to learn; None without a critic.
        behavior_logprobs: ``[N, T]`` float32, under what the tokens were drawn from, where that is not the policy that
            ``old_logprobs`` are of; None = it is.
        engine_logprobs: ``[N, T]`` by the engine with the policy's weights, where ``old_logprobs`` were computed anew;
            None = they are the engine's, or it had other weights.
        version: Optimizer steps that the policy had made when it began to learn from them.
        staleness: Optimizer steps between the policy that they were drawn from and that one.
    """

    key: BatchKey
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    targets: Tensor
    probs: Tensor
    per_dimension: Tensor
    rewards: Tensor
    advantages: Tensor
    used: Tensor
    ended: Tensor
    questions: list[Question]
    answers: list[str]
    values: Tensor | None = None
    returns: Tensor | None = None
    behavior_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    version: int | None = None
    staleness: int = 0

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def tokens(self) -> Tensor:
        """``[N, T]`` answer tokens."""
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def uninstructed(self) -> Tensor:
        """``[N]`` bool: the prompt asked for nothing."""
        return (self.targets < 0).all(dim=1)

    @property
    def completion_advantages(self) -> Tensor:
        """``[N]``: that of the answer, or the mean of its tokens'."""
        if self.advantages.dim() == 1:
            return self.advantages
        return (self.advantages * self.mask).sum(dim=1) / self.mask.sum(dim=1)

    @property
    def batch(self) -> CompletionBatch:
        """What a model is run over."""
        return CompletionBatch(self.input_ids, self.attention_mask, self.mask)

    def refuse_nonfinite(self) -> None:
        """Stops all processes where one of them has numbers that are NaN or infinite.

        Raises:
            UsageError: There are such numbers.
        """
        reason = self.nonfinite()
        if any_process(reason is not None, self.mask.device):
            raise UsageError(
                f"step {self.version}: {reason or 'a rollout of another process is not finite'}. Go on from an "
                "earlier checkpoint with a lower learning rate, or with trainer.gradient_clip_val; a reward or a level "
                "probability is the fault of mapping or classifier. With moslim.callbacks.Guards in "
                "trainer.callbacks such a step is kept, to be seen with `replay`"
            )

    def nonfinite(self) -> str | None:
        """Says which numbers of the rollout are NaN or infinite; None if all are finite."""
        mask = self.mask
        kinds = {
            "a log-probability of the policy": self.old_logprobs[mask],
            "a level probability of the classifier": self.probs,
            "a reward": self.rewards,
        }
        if self.ref_logprobs is not None:
            kinds["a log-probability of the reference"] = self.ref_logprobs[mask]
        if self.values is not None:
            kinds["a value of the critic"] = self.values[mask]
        kinds["an advantage"] = self.advantages
        return next((found for name, values in kinds.items() if (found := nonfinite(name, values))), None)

    def rows(self, index: Tensor) -> Rollout:
        """The answers at positions ``index``."""
        picked = index.tolist()
        changes: dict[str, Any] = {
            "questions": [self.questions[i] for i in picked],
            "answers": [self.answers[i] for i in picked],
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index]
        return dataclasses.replace(self, **changes)

    def minibatch(self, step: int, minibatches: int, samples: int, seed: Sequence[int]) -> Rollout:
        """One of the parts that an inner epoch cuts the prompts into, anew each time.

        Neighbours, as many as there are parts, are dealt to different ones. So the parts of several processes together
        are those of one process with the same batch, where each has a multiple of ``minibatches`` prompts.

        Args:
            step: Number of the training step in this rollout.
            minibatches: Parts per inner epoch; 1 gives the rollout as it is.
            samples: Answers per prompt, which stay together: they are compared, and what they begin with is shared.
            seed: What the cut depends on, beside rollout and inner epoch.

        Raises:
            UsageError: There are fewer prompts than parts.
        """
        if minibatches == 1:
            return self
        prompts = torch.arange(len(self)).reshape(-1, samples)
        if minibatches > len(prompts):
            raise UsageError(
                f"minibatches is {minibatches}, but a rollout has only {len(prompts)} prompts, whose answers stay "
                "together"
            )
        epoch, part = divmod(step, minibatches)
        generator = torch.Generator().manual_seed(derive_seed(*seed, *self.key, epoch))
        groups = -(-len(prompts) // minibatches)
        shape = process_count(), groups, minibatches
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)[process_rank()]
        noise[-1, minibatches - (groups * minibatches - len(prompts)) :] = torch.inf  # the first parts are the larger
        dealt = noise.argsort(dim=1).flatten()[: len(prompts)]
        return self.rows(prompts[dealt == part].flatten().to(self.mask.device))

    @property
    def update_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that updates learn from."""
        return self.mask & self.used[:, None]

    @property
    def value_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that a critic learns from, those of answers to which a reward applies."""
        return self.update_mask & ~self.per_dimension.isnan().all(dim=1, keepdim=True)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors on CPU, for a checkpoint that loads with ``weights_only``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Rollout:
        """Inverse of :meth:`state`."""
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()}
        moved["key"] = tuple(state["key"])
        return cls(**moved)


class CompletionSource(Protocol):
    """A callback that gives the completions of training batches in place of :meth:`RolloutCollector.sample`.

    It sets ``module.collector.completion_source`` to itself.
    """

    def __call__(
        self, collector: RolloutCollector, batch: PromptBatch, key: BatchKey, step: int, /
    ) -> tuple[Generations, int]:
        """Returns the completions of a batch, and the optimizer steps that the policy that sampled them had made."""


@dataclass
class RolloutCollector:
    """Makes rollouts; :meth:`collect` makes a whole one.

    Args:
        models: Policy, reference and critic.
        generator: Samples and decodes completions.
        scorer: From completions to level probabilities ``[N, D, K]``.
        mapping: From level probabilities and requested levels to rewards.
        reward_functions: Rewards beside the mapping's.
        optimizer: The algorithm, from rewards to advantages.
        forward_config: How forward passes are made.
        off_policy: Treatment of completions that another policy sampled.
        num_generations: Completions per prompt, ``n``.
        missing_eos_penalty: Loss of score of a completion that is cut at the length limit.
        seed: Seed of the noise.
        completion_source: Replacement of :meth:`sample`; None = none.
    """

    models: PolicyModels
    generator: CompletionGenerator
    scorer: Callable[[Generations], Tensor]
    mapping: MappingFunction
    reward_functions: RewardFunctions
    optimizer: PolicyOptimizer
    forward_config: ForwardConfig
    off_policy: OffPolicy
    num_generations: int
    missing_eos_penalty: float
    seed: int
    completion_source: CompletionSource | None = None

    @torch.no_grad()
    def collect(
        self,
        batch: PromptBatch,
        key: BatchKey,
        step: int,
        steps_per_rollout: int,
        sampler: PreferenceSampler | None,
        allow_nonfinite: bool,
        clock: Stopwatch,
    ) -> Rollout:
        """Makes one rollout with the current weights.

        Args:
            batch: ``G`` prompts.
            key: Their place in training.
            step: Optimizer steps that the policy has made.
            steps_per_rollout: Optimizer steps that will learn from the rollout.
            sampler: The source of the requests, for its statistics; None where there is none.
            allow_nonfinite: Whether NaN and infinity are left to a callback.
            clock: Receives the seconds of each phase.

        Returns:
            ``N = G * n`` completions and all that an update needs of them.

        Raises:
            UsageError: A number is not finite.
        """
        # 1. Generate completions.
        if self.completion_source is None:
            answers, version = self.sample(self.models.policy, batch, key), step
        else:
            answers, version = self.completion_source(self, batch, key, step)
        clock.lap("time/sample")

        # 2. Score them: level probabilities by the classifier.
        probs = self.scorer(answers)

        # 3. Map level probabilities and requested levels to rewards.
        targets = batch.targets.repeat_interleave(self.num_generations, dim=0)
        rewards = self.map_to_rewards(answers, probs, targets, batch.columns, sampler)
        clock.lap("time/reward")

        # 4. Log-probabilities of the tokens under the policy (old) and the reference; values of the critic.
        staleness = step - version
        completions, engine_logprobs = self.with_old_logprobs(answers, staleness, steps_per_rollout)
        clock.lap("time/old")
        tokens = CompletionBatch(answers.input_ids, answers.attention_mask, completions.mask)
        ref_logprobs: Tensor | None = None
        if self.optimizer.needs_reference:
            ref_logprobs = self.models.ref_logprobs(tokens, self.generator.engine.temperature, self.forward_config)
        clock.lap("time/reference")
        values = None if self.models.critic is None else self.models.values(tokens, self.forward_config)
        clock.lap("time/critic")

        # 5. Advantages.
        with full_precision():
            inputs = advantage_inputs(
                rewards, completions, ref_logprobs, values, self.missing_eos_penalty, self.num_generations
            )
            returns = self.optimizer.returns(inputs)
            advantages, used = self.optimizer.advantages(inputs), self.optimizer.used(inputs)

        rollout = Rollout(
            key=key,
            input_ids=answers.input_ids,
            attention_mask=answers.attention_mask,
            mask=completions.mask,
            old_logprobs=completions.logprobs,
            ref_logprobs=ref_logprobs,
            targets=targets,
            probs=probs,
            per_dimension=rewards.per_dimension,
            rewards=rewards.total,
            advantages=advantages.flatten(0, 1),
            used=used.flatten(),
            ended=completions.ended,
            questions=answers.questions,
            answers=answers.texts,
            values=values,
            returns=None if returns is None else returns.flatten(0, 1),
            behavior_logprobs=completions.behavior_logprobs,
            engine_logprobs=engine_logprobs,
            version=step,
            staleness=staleness,
        )
        if not allow_nonfinite:
            rollout.refuse_nonfinite()
        self.optimizer.observe(inputs)
        return rollout

    def sample(self, model: Any, batch: PromptBatch, key: BatchKey) -> Generations:
        """Samples ``n`` completions of each prompt with the policy or a copy of it."""
        keys = [(self.seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
        return self.generator(model, batch, keys, self.num_generations, finite=False)

    @full_precision()
    def map_to_rewards(
        self,
        answers: Generations,
        probs: Tensor,
        targets: Tensor,
        columns: Sequence[Any],
        sampler: PreferenceSampler | None,
    ) -> MappedReward:
        """Rewards by the mapping function and the reward functions.

        Mapping function and sampler see the completions of all processes.

        Args:
            answers: ``N`` completions.
            probs: ``[N, D, K]`` level probabilities.
            targets: ``[N, D]`` requested levels.
            columns: The prompts' own data, for the reward functions.
            sampler: The source of the requests, for its statistics.
        """
        all_probs, all_targets = of_all_processes(probs), of_all_processes(targets)
        self.mapping.observe(all_probs, all_targets)
        if sampler is not None:
            sampler.observe(self.mapping.preferences, all_probs, all_targets)
        groups = torch.arange(len(all_probs), device=probs.device) // self.num_generations
        mapped = self.mapping(all_probs, all_targets, groups)
        own = slice(process_rank() * len(probs), (process_rank() + 1) * len(probs))
        mapped = MappedReward(mapped.total[own], mapped.per_dimension[own], mapped.weights[own])
        values = self.reward_functions(answers, targets, columns)
        return self.reward_functions.join(mapped, values, self.mapping.is_mean)

    def with_old_logprobs(
        self, answers: Generations, staleness: int, steps_per_rollout: int
    ) -> tuple[Completions, Tensor | None]:
        """Replaces the log-probabilities of the engine where they are not those of the current policy.

        Args:
            answers: ``N`` completions.
            staleness: Optimizer steps since the weights that generated them.
            steps_per_rollout: Optimizer steps that will learn from them.

        Returns:
            The completions, and the engine's log-probabilities where only their rounding is another.
        """
        completions, engine = answers.completions, self.generator.engine
        recompute = staleness > 0 or self.off_policy.old_logprobs == "recompute"
        if not recompute and not (steps_per_rollout > 1 and reduced_precision(self.models.policy)):
            return completions, None
        tokens = CompletionBatch(answers.input_ids, answers.attention_mask, completions.mask)
        logprobs = completion_logprobs(self.models.policy, tokens, engine.temperature, self.forward_config)
        if recompute:
            return with_logprobs(completions, logprobs), None
        by_engine = completions.logprobs
        old, behavior = rounded_anew(logprobs, by_engine, completions.behavior_logprobs, engine.in_process)
        return dataclasses.replace(completions, logprobs=old, behavior_logprobs=behavior), by_engine


@full_precision()
def advantage_inputs(
    rewards: MappedReward,
    completions: Completions,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    missing_eos_penalty: float,
    num_generations: int,
) -> AdvantageInputs:
    """Arranges ``N = G * n`` completions by prompt, for the algorithm.

    Args:
        rewards: Their rewards.
        completions: Their tokens, and the log-probabilities of these.
        ref_logprobs: ``[N, T]`` under the reference, or None.
        values: ``[N, T]`` by the critic, or None.
        missing_eos_penalty: Loss of score of a completion that is cut at the length limit.
        num_generations: Completions per prompt, ``n``.
    """
    kl = torch.zeros_like(completions.logprobs)
    if ref_logprobs is not None:
        kl = k1(completions.logprobs, ref_logprobs) * completions.mask

    def by_prompt(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, num_generations))

    return AdvantageInputs(
        total=by_prompt(rewards.total),
        per_dimension=by_prompt(rewards.per_dimension),
        penalty=by_prompt(end_penalty(completions.ended, missing_eos_penalty)),
        token_kl=by_prompt(kl),
        mask=by_prompt(completions.mask),
        values=None if values is None else by_prompt(values),
        weights=by_prompt(rewards.weights),
    )


def end_penalty(ended: Tensor, penalty: float) -> Tensor:
    """Loss of score of ``N`` completions, those that did not end within the length limit; 0 for the others.

    They are neither masked from the loss, which would teach verbosity, nor dropped from the baseline.
    """
    return (~ended).float() * penalty
