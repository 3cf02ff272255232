"""The forward pass and the loss of an update.

The update: from a minibatch of a rollout to the loss of an optimizer step.

What is logged of rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from moslim.algorithms.base import LossInputs, PolicyOptimizer
from moslim.algorithms.functional import k1, k3
from moslim.generation.base import RolloutEngine
from moslim.ops.chunked_linear import Predictor
from moslim.ops.logprobs import CompletionPass, ForwardConfig, plan
from moslim.ops.numerics import full_precision
from moslim.policy.generation import rounded_anew
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rollout import Rollout
from moslim.preferences import PreferenceSet, expected_level, requested_probability
from moslim.training.distributed import mean_over_processes
from moslim.training.optim import step_batches
from moslim.utils.errors import UsageError


def rollout_batches(trainer: Trainer, batch_idx: int, repeats: int) -> tuple[list[int], float]:
    """The batches of the current rollout whose gradients make one optimizer step with that of ``batch_idx``.

    Args:
        trainer: The run's Trainer.
        batch_idx: Number of a batch in the epoch.
        repeats: Batches of a rollout.

    Returns:
        Their numbers in the epoch, and what their losses are multiplied by: a step over several rollouts is the mean of
        theirs, and Lightning divides by ``accumulate_grad_batches``.
    """
    window = step_batches(trainer, batch_idx)
    own = [number for number in window if number // repeats == batch_idx // repeats]
    return own, trainer.accumulate_grad_batches / len({number // repeats for number in window})


def check_accumulation_of_rollouts(trainer: Trainer, repeats: int) -> None:
    """Checks that optimizer steps end where rollouts do.

    Raises:
        UsageError: They do not.
    """
    accumulate = trainer.accumulate_grad_batches
    if repeats % accumulate and accumulate % repeats:
        raise UsageError(
            f"accumulate_grad_batches = {accumulate} must divide num_iterations * minibatches = {repeats}, or be a "
            "multiple of it: an optimizer step would end in the middle of a rollout"
        )


def warn_of_part_rollouts(trainer: Trainer, repeats: int) -> None:
    """Says where an epoch ends within a rollout, which is then used in part, by steps of full scale."""
    batches = trainer.num_training_batches
    if batches % repeats and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
        rank_zero_warn(
            f"an epoch has {batches} batches (trainer.limit_train_batches or overfit_batches), no multiple of "
            f"num_iterations * minibatches = {repeats}: only {batches % repeats} of the {repeats} batches of its last "
            "rollout are learnt from"
        )


@dataclass
class PolicyOutputs:
    """Results of the forward passes of policy and critic over ``N`` completions.

    Args:
        logprobs: ``[N, T]`` under the current weights, with gradient; 0 where masked or not needed.
        entropy: ``[N, T]`` nats, with gradient; None unless asked for.
        values: ``[N, T]`` by the critic, with gradient; None without a critic.
        default_kl: The sum over the tokens of prompts without instruction of the exact KL(policy || reference), with
            gradient; None unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    default_kl: Tensor | None


@dataclass
class StepLoss:
    """The loss of a minibatch.

    Args:
        loss: Scalar with gradient.
        logprobs: ``[N, T]`` under the current weights, detached.
        metrics: Detached scalars by name.
    """

    loss: Tensor
    logprobs: Tensor
    metrics: dict[str, Tensor]


@dataclass
class PolicyUpdate:
    """Computes the loss of one training step. :meth:`loss` is the whole of it.

    Args:
        models: Policy, reference and critic.
        optimizer: The algorithm, from advantages to loss.
        engine: The engine of the completions; its temperature and length limit count.
        forward_config: How forward passes are made.
        num_generations: Completions per prompt.
        default_kl_coef: Weight of the KL divergence on prompts without instruction.
        importance_clip: Largest importance weight of completions that another policy sampled; None = all are 1.
    """

    models: PolicyModels
    optimizer: PolicyOptimizer
    engine: RolloutEngine
    forward_config: ForwardConfig
    num_generations: int
    default_kl_coef: float
    importance_clip: float | None

    def loss(self, minibatch: Rollout, together: Sequence[Rollout], scale: float, first: bool) -> StepLoss:
        """The loss of a minibatch under the current weights.

        Args:
            minibatch: ``N`` completions.
            together: All minibatches of the rollout whose gradients make one optimizer step, ``minibatch`` among them.
            scale: Factor of the loss, see :func:`rollout_batches`.
            first: Whether no optimizer step lies between the rollout and this pass: the old log-probabilities are then
                those of this pass.
        """
        # 1. Forward passes: log-probabilities, entropy and values under the current weights.
        outputs = policy_outputs(
            self.models,
            minibatch,
            self.engine.temperature,
            self.forward_config,
            entropy=self.optimizer.needs_entropy,
            default_kl=self.default_kl_coef > 0,
        )

        # 2. Inputs of the loss: old log-probabilities, advantages, masks.
        inputs = self.loss_inputs(outputs, minibatch, together, scale, first)

        # 3. The algorithm's loss.
        with full_precision():
            output = self.optimizer.loss(inputs)
        loss, metrics = output.loss, {f"train/{name}": value for name, value in output.metrics.items()}

        # 4. KL divergence on prompts without instruction, which keeps the default behavior.
        default_kl = mean_default_kl(outputs.default_kl, together, scale)
        if default_kl is not None:
            loss = loss + self.default_kl_coef * default_kl
            metrics["train/default_kl"] = default_kl.detach()

        # 5. Metrics.
        metrics["train/loss"] = loss.detach()
        return StepLoss(loss, outputs.logprobs.detach(), metrics)

    def loss_inputs(
        self, outputs: PolicyOutputs, minibatch: Rollout, together: Sequence[Rollout], scale: float, first: bool
    ) -> LossInputs:
        """Puts together the inputs of the algorithm's loss; see :meth:`loss` for the arguments."""
        old_logprobs, behavior_logprobs = minibatch.old_logprobs, minibatch.behavior_logprobs
        if first:
            old_logprobs, behavior_logprobs = rounded_anew(
                outputs.logprobs.detach(), old_logprobs, behavior_logprobs, self.engine.in_process
            )
        return LossInputs(
            logprobs=outputs.logprobs,
            old_logprobs=old_logprobs,
            advantages=minibatch.advantages,
            mask=minibatch.update_mask,
            max_completion_length=self.engine.max_new_tokens,
            num_generations=self.num_generations,
            ref_logprobs=minibatch.ref_logprobs,
            entropy=outputs.entropy,
            values=outputs.values,
            old_values=minibatch.values,
            returns=minibatch.returns,
            value_mask=minibatch.value_mask,
            behavior_logprobs=behavior_logprobs,
            importance_clip=self.importance_clip,
            step_mask=torch.cat([part.update_mask for part in together]),
            step_value_mask=torch.cat([part.value_mask for part in together]),
            parts=scale,
        )


def policy_outputs(
    models: PolicyModels,
    minibatch: Rollout,
    temperature: float,
    forward_config: ForwardConfig,
    entropy: bool = False,
    default_kl: bool = False,
) -> PolicyOutputs:
    """Runs policy and critic over a minibatch. Completions that nothing needs are skipped.

    Args:
        models: Policy, critic and reference.
        minibatch: ``N`` completions.
        temperature: The sampler's.
        forward_config: How forward passes are made.
        entropy: Whether to compute the entropy of the (tempered) distributions.
        default_kl: Whether to compute the divergence from the reference on prompts without instruction.
    """
    uninstructed = minibatch.uninstructed if default_kl else torch.zeros_like(minibatch.uninstructed)
    needed = minibatch.used | uninstructed
    if not needed.any():
        needed[0] = True  # its mask is empty, but every process must have a gradient, be it zero
    predictor = Predictor(models.policy, forward_config.chunked_logprobs)
    logprobs = torch.zeros(minibatch.mask.shape, dtype=predictor.dtype, device=minibatch.mask.device)
    entropies = torch.zeros_like(logprobs) if entropy else None
    # the states that predict tokens are what a critic on the policy's trunk reads, too
    values = torch.zeros_like(logprobs) if models.critic_shares_backbone and predictor.head is not None else None
    divergence = logprobs.new_zeros(())
    for group, compared in ((needed & ~uninstructed, False), (uninstructed, True)):
        answer_passes = plan(models.policy, minibatch.batch, forward_config, group.nonzero()[:, 0])
        references = (
            _reference_states(models, answer_passes, forward_config) if compared else [None] * len(answer_passes)
        )
        for answer_pass, reference in zip(answer_passes, references, strict=True):
            states = answer_pass.states(predictor)
            statistics = predictor.statistics(states, answer_pass.tokens, temperature, entropy, reference)
            answer_pass.put(logprobs, statistics.logprobs)
            if entropies is not None and statistics.entropy is not None:
                answer_pass.put(entropies, statistics.entropy)
            if values is not None and models.critic is not None:
                answer_pass.put(values, models.critic(states))
            if statistics.kl is not None:
                divergence = divergence + answer_pass.spread(statistics.kl).sum()
    if models.critic is not None and values is None:
        values = models.values(minibatch.batch, forward_config, needed.nonzero()[:, 0])
    return PolicyOutputs(logprobs, entropies, values, divergence if default_kl else None)


def mean_default_kl(total: Tensor | None, together: Sequence[Rollout], scale: float) -> Tensor | None:
    """Averages the divergence over the tokens of prompts without instruction.

    Args:
        total: Its sum over those of this process's minibatch; None if it was not asked for.
        together: All minibatches of the rollout whose gradients make one optimizer step.
        scale: Factor of the loss.

    Returns:
        This process's part, such that the mean over processes and minibatches is that over all tokens; None if no
        process has such prompts.
    """
    if total is None:
        return None
    uninstructed_mask = torch.cat([part.mask[part.uninstructed] for part in together])
    tokens = mean_over_processes(uninstructed_mask.sum()) / scale
    return total / tokens if tokens > 0 else None


def _reference_states(
    models: PolicyModels, answer_passes: Sequence[CompletionPass], forward_config: ForwardConfig
) -> list[tuple[Predictor, Tensor]]:
    """The reference's states of all passes: in a row, as switching between policy and reference takes time."""
    with torch.no_grad(), models.reference() as reference:
        predictor = Predictor(reference, forward_config.chunked_logprobs)
        return [(predictor, answer_pass.states(predictor)) for answer_pass in answer_passes]


def progress_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """What the progress bar shows: mean reward of instructed answers, KL divergence in nats per answer."""
    metrics = {"train/reward": rollout.rewards[~rollout.per_dimension.isnan().all(dim=1)].mean()}
    if rollout.ref_logprobs is not None:
        kl = k1(rollout.old_logprobs, rollout.ref_logprobs) * rollout.mask
        metrics["train/kl"] = kl.sum(dim=1).mean()
    return {name: value for name, value in metrics.items() if not value.isnan()}


def rollout_metrics(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, Tensor]:
    """Further scalars by name; what has no value, because nothing asked for it, is left out.

    ``train/proxy`` is the mean probability that the classifier gives to the requested levels, ``train/gold`` the share
    of requested levels that the judge finds: the gap between them is how far the classifier is being fooled.
    ``train/entropy`` is estimated from the sampled tokens, whose mean negative log-probability it is.

    Args:
        rollout: ``N`` answers.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels that the judge found, for gold; None leaves it out.
    """
    metrics: dict[str, Tensor] = {
        "train/length": rollout.mask.sum(dim=1).float().mean(),  # tokens per answer
        "train/truncated": 1 - rollout.ended.float().mean(),
        "train/used": rollout.used.float().mean(),  # share of answers that take part in updates
        "train/entropy": -(rollout.old_logprobs * rollout.mask).sum() / rollout.mask.sum(),  # nats per token
    }
    if rollout.ref_logprobs is not None:
        per_token = k3(rollout.old_logprobs, rollout.ref_logprobs) * rollout.mask
        metrics["train/kl_k3"] = per_token.sum() / rollout.mask.sum()  # nats per token
    by_dimension = {"proxy": requested_probability(rollout.probs, rollout.targets)}
    if judged is not None:
        hit = (judged == rollout.targets).float()
        by_dimension["gold"] = hit.masked_fill((rollout.targets < 0) | judged.isnan(), torch.nan)
    metrics |= {f"train/{kind}": values.nanmean() for kind, values in by_dimension.items()}
    for kind, values in {"reward": rollout.per_dimension[:, : len(preferences)], **by_dimension}.items():
        per_dimension = zip(preferences.names, values.nanmean(dim=0), strict=True)
        metrics |= {f"train/{kind}/{name}": value for name, value in per_dimension}
    return {name: value for name, value in metrics.items() if not value.isnan()}


def level_offsets(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, float]:
    """How far the achieved levels lie above (+) or below (-) the requested one, in levels.

    Args:
        rollout: ``N`` answers.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels that the judge found; None takes those that the classifier expects.

    Returns:
        Mean by ``offset/{dimension}/{number of the requested level}``; a level that nothing asked for is left out.
    """
    targets, width = rollout.targets, rollout.probs.shape[-1]
    achieved = expected_level(rollout.probs) if judged is None else judged
    known = (targets >= 0) & ~achieved.isnan()
    asked = F.one_hot(targets.clamp(min=0), width) * known[..., None]  # [N, D, K]
    offsets = ((achieved - targets).nan_to_num()[..., None] * asked).sum(dim=0) / asked.sum(dim=0)  # 0 / 0 = NaN
    rows = zip(preferences.names, offsets.tolist(), strict=True)
    found = {f"offset/{name}/{level}": value for name, row in rows for level, value in enumerate(row)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def staleness_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Distance of the sampler from the policy; empty where they are the same."""
    if rollout.behavior_logprobs is None:
        return {}
    surplus = (rollout.old_logprobs - rollout.behavior_logprobs)[rollout.mask]
    return {
        "train/off_policy/staleness": surplus.new_tensor(rollout.staleness),
        "train/off_policy/kl": k3(-surplus, torch.zeros_like(surplus)).mean(),  # KL(sampler || policy), nats per token
    }
