"""Rollouts: completions of a batch of prompts with their rewards and advantages, and the collector that makes them."""

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
from moslim.ops.logprobs import ForwardConfig
from moslim.ops.numerics import derive_seed, full_precision, nonfinite
from moslim.policy.generation import (
    BatchKey,
    CompletionGenerator,
    Generations,
    OffPolicy,
    Purpose,
    with_old_logprobs,
)
from moslim.policy.policy_models import PolicyModels
from moslim.policy.reward_functions import RewardFunctions
from moslim.training.base_module import Stopwatch
from moslim.training.distributed import any_process, of_all_processes, process_count, process_rank
from moslim.utils.errors import UsageError


@dataclass
class Rollout:
    """Completions of a batch of prompts, with rewards, log-probabilities and advantages.

    Shapes: ``G`` prompts with ``n`` completions each, ``N = G * n`` completions, those of one prompt adjacent; ``P``
    prompt tokens, ``T`` completion tokens, ``D`` dimensions of ``K`` levels, ``F`` reward functions. Floats are float32
    or finer.

    Args:
        key: Training batch of the rollout: epoch, and batch number without repeats.
        input_ids: ``[N, P + T]`` prompts, left-padded, and completions, right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, completion tokens up to and including the end-of-sequence token.
        old_logprobs: ``[N, T]`` log-probabilities under the policy that made the rollout, before its first optimizer
            step on it; 0 where masked.
        ref_logprobs: ``[N, T]`` log-probabilities under the reference; None unless the algorithm needs them.
        targets: ``[N, D]`` int64, requested levels; -1 = not requested.
        probs: ``[N, D, K]`` level probabilities of the classifier.
        per_dimension: ``[N, D + F]`` rewards of the dimensions, then of the reward functions; NaN where inactive.
        rewards: ``[N]`` total rewards.
        advantages: ``[N]`` or ``[N, T]`` advantages of the algorithm.
        used: ``[N]`` bool, the completion takes part in updates.
        ended: ``[N]`` bool, False where the completion was truncated at the length limit.
        questions: ``N`` questions as the classifier read them.
        completion_texts: ``N`` decoded completions.
        values: ``[N, T]`` values of the critic, 0 where masked; None without a critic.
        returns: ``[N, T]`` regression targets of the critic; None without a critic.
        behavior_logprobs: ``[N, T]`` log-probabilities under the policy that sampled the tokens; None = that of
            ``old_logprobs``.
        engine_logprobs: ``[N, T]`` log-probabilities by the engine, where ``old_logprobs`` were recomputed with the
            same weights; else None.
        version: Optimizer steps made before the rollout was collected.
        staleness: Optimizer steps between the weights that sampled the tokens and those of ``old_logprobs``.
        hindsight_ids: ``[N, P']`` left-padded second prompts of relabelled completions; None without relabelling.
        hindsight_mask: ``[N, P']`` attention mask of these, 0 throughout where a completion is not relabelled.
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
    completion_texts: list[str]
    values: Tensor | None = None
    returns: Tensor | None = None
    behavior_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    version: int | None = None
    staleness: int = 0
    hindsight_ids: Tensor | None = None
    hindsight_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def tokens(self) -> Tensor:
        """``[N, T]`` completion tokens."""
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def uninstructed(self) -> Tensor:
        """``[N]`` bool: the prompt requests no level."""
        return (self.targets < 0).all(dim=1)

    @property
    def completion_advantages(self) -> Tensor:
        """``[N]`` advantages per completion: the mean over its tokens where advantages are per token."""
        if self.advantages.dim() == 1:
            return self.advantages
        return (self.advantages * self.mask).sum(dim=1) / self.mask.sum(dim=1)

    @property
    def batch(self) -> CompletionBatch:
        """The tokens and masks of the completions, for forward passes."""
        return CompletionBatch(self.input_ids, self.attention_mask, self.mask)

    def refuse_nonfinite(self) -> None:
        """Raises a UsageError in all processes if one of them has NaN or infinite numbers."""
        reason = self.nonfinite()
        if any_process(reason is not None, self.mask.device):
            raise UsageError(
                f"step {self.version}: {reason or 'a rollout of another process is not finite'}. Go on from an "
                "earlier checkpoint with a lower learning rate, or with trainer.gradient_clip_val; a reward or a level "
                "probability is the fault of mapping or classifier. With moslim.callbacks.Guards in "
                "trainer.callbacks such a step is kept, to be seen with `replay`"
            )

    def nonfinite(self) -> str | None:
        """The numbers of the rollout that are NaN or infinite, in words; None if all are finite."""
        mask = self.mask
        tensors = {
            "a log-probability of the policy": self.old_logprobs[mask],
            "a level probability of the classifier": self.probs,
            "a reward": self.rewards,
            "a log-probability of the reference": None if self.ref_logprobs is None else self.ref_logprobs[mask],
            "a value of the critic": None if self.values is None else self.values[mask],
            "an advantage": self.advantages,
        }
        reasons = (nonfinite(name, values) for name, values in tensors.items() if values is not None)
        return next((reason for reason in reasons if reason), None)

    def rows(self, index: Tensor) -> Rollout:
        """The rollout of the completions at positions ``index``."""
        positions = index.tolist()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        changes |= {name: [values[name][i] for i in positions] for name in ("questions", "completion_texts")}
        return dataclasses.replace(self, **changes)

    def minibatch(self, step: int, minibatches: int, samples: int, seed: Sequence[int]) -> Rollout:
        """The minibatch of a training step. Each iteration splits the prompts of the rollout at random.

        Every ``minibatches`` neighbouring prompts go to different minibatches, so that they do not depend on the number
        of processes if each has a multiple of ``minibatches`` prompts.

        Args:
            step: Number of the training step in this rollout.
            minibatches: Minibatches per iteration; 1 returns the whole rollout.
            samples: Completions per prompt, ``n``; they stay together.
            seed: Seed of the split, beside rollout and iteration.

        Raises:
            UsageError: There are fewer prompts than minibatches.
        """
        if minibatches == 1:
            return self
        prompts = torch.arange(len(self)).reshape(-1, samples)
        if minibatches > len(prompts):
            raise UsageError(
                f"minibatches is {minibatches}, but a rollout has only {len(prompts)} prompts, whose "
                "completions stay together"
            )
        iteration, number = divmod(step, minibatches)
        generator = torch.Generator().manual_seed(derive_seed(*seed, *self.key, iteration))
        groups = -(-len(prompts) // minibatches)
        shape = process_count(), groups, minibatches
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)[process_rank()]
        noise[-1, minibatches - (groups * minibatches - len(prompts)) :] = torch.inf  # the first ones are the larger
        assigned = noise.argsort(dim=1).flatten()[: len(prompts)]  # minibatch of each prompt
        return self.rows(prompts[assigned == number].flatten().to(self.mask.device))

    @property
    def update_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that the policy learns from."""
        return self.mask & self.used[:, None]

    @property
    def value_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that the critic learns from, those of rewarded completions."""
        return self.update_mask & ~self.per_dimension.isnan().all(dim=1, keepdim=True)

    def state(self) -> dict[str, Any]:
        """Plain data and CPU tensors, for a checkpoint that loads with ``weights_only``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Rollout:
        """Inverse of :meth:`state`."""
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()}
        moved["key"] = tuple(state["key"])
        return cls(**moved)


class CompletionSource(Protocol):
    """Callback that supplies the completions of training batches instead of :meth:`RolloutCollector.sample`.

    It sets ``module.collector.completion_source`` to itself.
    """

    def __call__(
        self, collector: RolloutCollector, batch: PromptBatch, key: BatchKey, step: int, /
    ) -> tuple[Generations, int]:
        """Returns the completions of a batch, and the number of optimizer steps made before they were sampled."""


@dataclass
class RolloutCollector:
    """Makes rollouts: call :meth:`collect`.

    Args:
        models: Policy, reference and critic.
        generator: Samples and decodes completions.
        scorer: Computes level probabilities ``[N, D, K]`` of completions.
        mapping: Maps level probabilities and requested levels to rewards.
        reward_functions: Further rewards by Python functions.
        optimizer: Algorithm; computes advantages from rewards.
        forward_config: Options of forward passes.
        off_policy: Treatment of completions that another policy sampled.
        num_generations: Completions per prompt, ``n``.
        missing_eos_penalty: Deduction from the score of a completion that is truncated at the length limit.
        seed: Seed of the sampling.
        completion_source: Replacement of :meth:`sample`; None = no replacement.
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
            key: Training batch: epoch, and batch number without repeats.
            step: Optimizer steps made so far.
            steps_per_rollout: Optimizer steps per rollout.
            sampler: Sampler of the requested preferences, which receives statistics; None = no sampler.
            allow_nonfinite: Whether NaN and infinity are left to a callback.
            clock: Receives the seconds of each phase.

        Returns:
            Rollout of ``N = G * n`` completions.

        Raises:
            UsageError: A number is not finite.
        """
        # 1. Generate completions.
        if self.completion_source is None:
            generations, version = self.sample(self.models.policy, batch, key), step
        else:
            generations, version = self.completion_source(self, batch, key, step)
        clock.lap("time/sample")

        # 2. Score them: level probabilities by the classifier.
        probs = self.scorer(generations)

        # 3. Map level probabilities and requested levels to rewards.
        targets = batch.targets.repeat_interleave(self.num_generations, dim=0)
        rewards = self.map_to_rewards(generations, probs, targets, batch.columns, sampler)
        clock.lap("time/reward")

        # 4. Log-probabilities of the tokens under the policy (old) and the reference; values of the critic.
        staleness = step - version
        completions, engine_logprobs = with_old_logprobs(
            self.models.policy,
            generations,
            self.generator.engine,
            self.off_policy,
            self.forward_config,
            staleness,
            several_steps=steps_per_rollout > 1,
        )
        clock.lap("time/old")
        tokens = CompletionBatch(generations.input_ids, generations.attention_mask, completions.mask)
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
            input_ids=generations.input_ids,
            attention_mask=generations.attention_mask,
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
            questions=generations.questions,
            completion_texts=generations.texts,
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
        """Samples ``n`` completions per prompt with ``model``, the policy or a copy of it."""
        keys = [(self.seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
        return self.generator(model, batch, keys, self.num_generations, finite=False)

    @full_precision()
    def map_to_rewards(
        self,
        generations: Generations,
        probs: Tensor,
        targets: Tensor,
        columns: Sequence[Any],
        sampler: PreferenceSampler | None,
    ) -> MappedReward:
        """Computes the rewards by the mapping function and the reward functions.

        Mapping function and sampler receive the completions of all processes.

        Args:
            generations: ``N`` completions.
            probs: ``[N, D, K]`` level probabilities.
            targets: ``[N, D]`` requested levels.
            columns: Further data fields of the ``G`` prompts, for the reward functions.
            sampler: Sampler of the requested preferences, which receives statistics; None = no sampler.
        """
        all_probs, all_targets = of_all_processes(probs), of_all_processes(targets)
        self.mapping.observe(all_probs, all_targets)
        if sampler is not None:
            sampler.observe(self.mapping.preferences, all_probs, all_targets)
        groups = torch.arange(len(all_probs), device=probs.device) // self.num_generations
        mapped = self.mapping(all_probs, all_targets, groups)
        local = slice(process_rank() * len(probs), (process_rank() + 1) * len(probs))
        mapped = MappedReward(mapped.total[local], mapped.per_dimension[local], mapped.weights[local])
        values = self.reward_functions(generations, targets, columns)
        return self.reward_functions.join(mapped, values, self.mapping.is_mean)


@full_precision()
def advantage_inputs(
    rewards: MappedReward,
    completions: Completions,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    missing_eos_penalty: float,
    num_generations: int,
) -> AdvantageInputs:
    """Groups ``N = G * n`` completions by prompt, as inputs of the algorithm.

    Args:
        rewards: Rewards of the completions.
        completions: Tokens, mask and ``old_logprobs`` of the completions.
        ref_logprobs: ``[N, T]`` log-probabilities under the reference, or None.
        values: ``[N, T]`` values of the critic, or None.
        missing_eos_penalty: Deduction from the score of a completion that is truncated at the length limit.
        num_generations: Completions per prompt, ``n``.
    """
    kl = torch.zeros_like(completions.logprobs)
    if ref_logprobs is not None:
        kl = k1(completions.logprobs, ref_logprobs) * completions.mask

    def by_prompt(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, num_generations))

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
    """``[N]`` deduction from the score: ``penalty`` where the completion was truncated, else 0.

    Truncated completions stay in the loss and in the baseline; masking them would reward verbosity.
    """
    return (~ended).float() * penalty
