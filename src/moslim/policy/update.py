"""The loss of a training step, from a minibatch of a rollout, and the metrics of rollouts."""

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
from moslim.ops.logprobs import ForwardConfig, plan
from moslim.ops.numerics import full_precision
from moslim.policy.generation import rounded_anew
from moslim.policy.hindsight import Hindsight, hindsight_loss
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rehearsal import RehearsalTexts, rehearsal_kl
from moslim.policy.rollout import Rollout
from moslim.preferences import PreferenceSet, expected_level, requested_probability
from moslim.training.distributed import mean_over_processes
from moslim.training.optim import step_batches
from moslim.utils.errors import UsageError


def rollout_batches(trainer: Trainer, batch_idx: int, repeats: int) -> tuple[list[int], float]:
    """The batches of the current rollout that make one optimizer step together with batch ``batch_idx``.

    Args:
        trainer: The Trainer of the run.
        batch_idx: Number of a batch in the epoch.
        repeats: Batches per rollout, ``num_iterations * minibatches``.

    Returns:
        Their numbers in the epoch, and ``loss_scale``, the factor of their losses. Lightning divides losses by
        ``accumulate_grad_batches``; the loss of a step over several rollouts is the mean over these.
    """
    step_numbers = step_batches(trainer, batch_idx)
    of_rollout = [number for number in step_numbers if number // repeats == batch_idx // repeats]
    return of_rollout, trainer.accumulate_grad_batches / len({number // repeats for number in step_numbers})


def check_accumulation_of_rollouts(trainer: Trainer, repeats: int) -> None:
    """Checks that no optimizer step ends in the middle of a rollout.

    Raises:
        UsageError: ``accumulate_grad_batches`` neither divides ``repeats`` nor is a multiple of it.
    """
    accumulate = trainer.accumulate_grad_batches
    if repeats % accumulate and accumulate % repeats:
        raise UsageError(
            f"accumulate_grad_batches = {accumulate} must divide num_iterations * minibatches = {repeats}, or be a "
            "multiple of it: an optimizer step would end in the middle of a rollout"
        )


def warn_of_part_rollouts(trainer: Trainer, repeats: int) -> None:
    """Warns if an epoch ends in the middle of a rollout, so that only a part of it is used."""
    batches = trainer.num_training_batches
    if batches % repeats and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
        rank_zero_warn(
            f"an epoch has {batches} batches (trainer.limit_train_batches or overfit_batches), no multiple of "
            f"num_iterations * minibatches = {repeats}: only {batches % repeats} of the {repeats} batches of its last "
            "rollout are used"
        )


@dataclass
class PolicyOutputs:
    """Outputs of the forward passes of policy and critic over ``N`` completions, with gradient.

    Args:
        logprobs: ``[N, T]`` log-probabilities under the current weights; 0 where masked or not needed.
        entropy: ``[N, T]`` entropy in nats; None unless requested.
        values: ``[N, T]`` values of the critic; None without a critic.
        default_kl: Scalar, the exact KL(policy || reference) summed over the tokens of completions to prompts without
            instruction; None unless requested.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    default_kl: Tensor | None


@dataclass
class StepLoss:
    """Loss of a minibatch.

    Args:
        loss: Scalar with gradient.
        logprobs: ``[N, T]`` log-probabilities under the current weights, detached.
        metrics: Detached scalars by name.
    """

    loss: Tensor
    logprobs: Tensor
    metrics: dict[str, Tensor]


@dataclass
class PolicyUpdate:
    """Computes the loss of one training step: call :meth:`loss`.

    Args:
        models: Policy, reference and critic.
        optimizer: Algorithm; computes the loss from log-probabilities and advantages.
        engine: Engine that sampled the completions; gives temperature and length limit.
        forward_config: Options of forward passes.
        num_generations: Completions per prompt, ``n``.
        default_kl_coef: Weight of KL(policy || reference) on prompts without instruction.
        importance_clip: Largest importance weight; None = no correction, all weights are 1.
        hindsight: Options of hindsight relabelling; None = no such term.
        rehearsal: Texts of rehearsal; None = no such term.
    """

    models: PolicyModels
    optimizer: PolicyOptimizer
    engine: RolloutEngine
    forward_config: ForwardConfig
    num_generations: int
    default_kl_coef: float
    importance_clip: float | None
    hindsight: Hindsight | None = None
    rehearsal: RehearsalTexts | None = None

    def loss(
        self, minibatch: Rollout, together: Sequence[Rollout], loss_scale: float, first: bool, batch_idx: int
    ) -> StepLoss:
        """Computes the loss of a minibatch under the current weights.

        Args:
            minibatch: ``N`` completions.
            together: All minibatches of the rollout that make one optimizer step, ``minibatch`` included.
            loss_scale: Factor of the loss, see :func:`rollout_batches`.
            first: Whether no optimizer step has been made since the rollout; ``old_logprobs`` are then taken from this
                forward pass.
            batch_idx: Number of the training step in its epoch.
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
        inputs = self.loss_inputs(outputs, minibatch, together, loss_scale, first)

        # 3. The algorithm's loss.
        with full_precision():
            output = self.optimizer.loss(inputs)
        loss, metrics = output.loss, {f"train/{name}": value for name, value in output.metrics.items()}

        # 4. KL penalty on prompts without instruction, which preserves the default behavior.
        default_kl = mean_default_kl(outputs.default_kl, together, loss_scale)
        if default_kl is not None:
            loss = loss + self.default_kl_coef * default_kl
            metrics["train/default_kl"] = default_kl.detach()

        # 5. Log-likelihood of relabelled completions.
        if self.hindsight is not None:
            hindsight = hindsight_loss(
                self.models, minibatch, together, self.engine.temperature, self.forward_config, loss_scale
            )
            if hindsight is not None:
                loss = loss + self.hindsight.weight(minibatch.version or 0) * hindsight
                metrics["train/hindsight_nll"] = hindsight.detach()

        # 6. KL penalty on the texts of rehearsal.
        if self.rehearsal is not None:
            texts = self.rehearsal.batch((minibatch.key[0], batch_idx), minibatch.mask.device)
            kl = rehearsal_kl(self.models, texts, self.engine.temperature, self.forward_config)
            loss = loss + self.rehearsal.options.kl_coef * kl
            metrics["train/rehearsal_kl"] = kl.detach()

        # 7. Metrics.
        metrics["train/loss"] = loss.detach()
        return StepLoss(loss, outputs.logprobs.detach(), metrics)

    def loss_inputs(
        self, outputs: PolicyOutputs, minibatch: Rollout, together: Sequence[Rollout], loss_scale: float, first: bool
    ) -> LossInputs:
        """Collects the inputs of the algorithm's loss; see :meth:`loss` for the arguments."""
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
            loss_scale=loss_scale,
        )


def policy_outputs(
    models: PolicyModels,
    minibatch: Rollout,
    temperature: float,
    forward_config: ForwardConfig,
    entropy: bool = False,
    default_kl: bool = False,
) -> PolicyOutputs:
    """Runs policy and critic over a minibatch. Unused completions are skipped.

    Args:
        models: Policy, reference and critic.
        minibatch: ``N`` completions.
        temperature: Sampling temperature.
        forward_config: Options of forward passes.
        entropy: Whether to compute the entropy of the distributions at that temperature.
        default_kl: Whether to compute the KL to the reference on prompts without instruction.
    """
    uninstructed = minibatch.uninstructed if default_kl else torch.zeros_like(minibatch.uninstructed)
    needed = minibatch.used | uninstructed
    if not needed.any():
        needed[0] = True  # its mask is empty, but every process needs a gradient, if only zeros
    predictor = Predictor(models.policy, forward_config.chunked_logprobs)
    logprobs = torch.zeros(minibatch.mask.shape, dtype=predictor.dtype, device=minibatch.mask.device)
    entropies = torch.zeros_like(logprobs) if entropy else None
    # a critic on the policy's backbone reads the states that predict tokens
    values = torch.zeros_like(logprobs) if models.critic_shares_backbone and predictor.head is not None else None
    kl_sum = logprobs.new_zeros(())
    for group, needs_kl in ((needed & ~uninstructed, False), (uninstructed, True)):
        passes = plan(models.policy, minibatch.batch, forward_config, group.nonzero()[:, 0])
        ref_states = models.reference_states(passes, forward_config) if needs_kl else [None] * len(passes)
        for forward_pass, ref_state in zip(passes, ref_states, strict=True):
            states = forward_pass.states(predictor)
            statistics = predictor.statistics(states, forward_pass.tokens, temperature, entropy, ref_state)
            forward_pass.put(logprobs, statistics.logprobs)
            if entropies is not None and statistics.entropy is not None:
                forward_pass.put(entropies, statistics.entropy)
            if values is not None and models.critic is not None:
                forward_pass.put(values, models.critic(states))
            if statistics.kl is not None:
                kl_sum = kl_sum + forward_pass.spread(statistics.kl).sum()
    if models.critic is not None and values is None:
        values = models.values(minibatch.batch, forward_config, needed.nonzero()[:, 0])
    return PolicyOutputs(logprobs, entropies, values, kl_sum if default_kl else None)


def mean_default_kl(total: Tensor | None, together: Sequence[Rollout], loss_scale: float) -> Tensor | None:
    """Averages the KL to the reference over the tokens of completions to prompts without instruction.

    Args:
        total: Sum over these tokens in the minibatch of this process; None if it was not requested.
        together: All minibatches of the rollout that make one optimizer step.
        loss_scale: Factor of the loss, see :func:`rollout_batches`.

    Returns:
        The share of this minibatch: its mean over processes and minibatches is the mean over all tokens. None if no
        process has such prompts.
    """
    if total is None:
        return None
    uninstructed_mask = torch.cat([part.mask[part.uninstructed] for part in together])
    tokens = mean_over_processes(uninstructed_mask.sum()) / loss_scale
    return total / tokens if tokens > 0 else None


def progress_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Metrics of the progress bar: mean reward of rewarded completions, and KL in nats per completion."""
    metrics = {"train/reward": rollout.rewards[~rollout.per_dimension.isnan().all(dim=1)].mean()}
    if rollout.ref_logprobs is not None:
        kl = k1(rollout.old_logprobs, rollout.ref_logprobs) * rollout.mask
        metrics["train/kl"] = kl.sum(dim=1).mean()
    return {name: value for name, value in metrics.items() if not value.isnan()}


def rollout_metrics(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, Tensor]:
    """Further scalars by name, without those that have no value.

    ``train/proxy`` is the mean probability of the requested levels by the classifier, ``train/gold`` the fraction of
    requested levels that the judge confirms; a growing difference indicates reward hacking. ``train/entropy`` is the
    mean negative log-probability of the sampled tokens.

    Args:
        rollout: ``N`` completions.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels by the judge; None = no ``train/gold``.
    """
    metrics: dict[str, Tensor] = {
        "train/length": rollout.mask.sum(dim=1).float().mean(),  # tokens per completion
        "train/truncated": 1 - rollout.ended.float().mean(),
        "train/used": rollout.used.float().mean(),  # fraction of completions that take part in updates
        "train/entropy": -(rollout.old_logprobs * rollout.mask).sum() / rollout.mask.sum(),  # nats per token
    }
    if rollout.ref_logprobs is not None:
        per_token = k3(rollout.old_logprobs, rollout.ref_logprobs) * rollout.mask
        metrics["train/kl_k3"] = per_token.sum() / rollout.mask.sum()  # nats per token
    by_dimension = {"proxy": requested_probability(rollout.probs, rollout.targets)}
    if judged is not None:
        hit = (judged == rollout.targets).float()
        by_dimension["gold"] = hit.masked_fill((rollout.targets < 0) | judged.isnan(), torch.nan)
    metrics |= {f"train/{metric}": values.nanmean() for metric, values in by_dimension.items()}
    for metric, values in {"reward": rollout.per_dimension[:, : len(preferences)], **by_dimension}.items():
        means = zip(preferences.names, values.nanmean(dim=0), strict=True)
        metrics |= {f"train/{metric}/{name}": mean for name, mean in means}
    metrics |= staleness_metrics(rollout)
    return {name: value for name, value in metrics.items() if not value.isnan()}


def level_offsets(rollout: Rollout, preferences: PreferenceSet, judged: Tensor | None) -> dict[str, float]:
    """Mean difference of achieved minus requested level, in levels.

    Args:
        rollout: ``N`` completions.
        preferences: The ``D`` dimensions.
        judged: ``[N, D]`` levels by the judge; None = expected levels by the classifier.

    Returns:
        Mean by ``offset/{dimension}/{number of the requested level}``, for the levels that were requested.
    """
    targets, width = rollout.targets, rollout.probs.shape[-1]
    achieved = expected_level(rollout.probs) if judged is None else judged
    known = (targets >= 0) & ~achieved.isnan()
    requested = F.one_hot(targets.clamp(min=0), width) * known[..., None]  # [N, D, K]
    offsets = ((achieved - targets).nan_to_num()[..., None] * requested).sum(dim=0) / requested.sum(dim=0)  # or NaN
    by_name = {
        f"offset/{name}/{level}": offset
        for name, level_means in zip(preferences.names, offsets.tolist(), strict=True)
        for level, offset in enumerate(level_means)
    }
    return {name: offset for name, offset in by_name.items() if not math.isnan(offset)}


def staleness_metrics(rollout: Rollout) -> dict[str, Tensor]:
    """Distance between the policy and the behavior policy; empty where they are the same."""
    if rollout.behavior_logprobs is None:
        return {}
    log_weights = (rollout.old_logprobs - rollout.behavior_logprobs)[rollout.mask]
    return {
        "train/off_policy/staleness": log_weights.new_tensor(rollout.staleness),
        # KL(behavior policy || policy), nats per token
        "train/off_policy/kl": k3(-log_weights, torch.zeros_like(log_weights)).mean(),
    }
