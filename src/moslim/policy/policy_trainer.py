"""Training of a policy to follow the preference levels in its prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moslim.algorithms.base import PolicyOptimizer
from moslim.algorithms.functional import CRITIC_RATE
from moslim.data.samplers import PreferenceSampler
from moslim.data.types import PromptBatch
from moslim.data.views import BatchView, PolicyView
from moslim.evaluation.judges import Judge
from moslim.generation.base import RolloutEngine
from moslim.generation.torch_engine import TorchEngine
from moslim.mapping.base import MappingFunction
from moslim.ops.logprobs import ForwardConfig
from moslim.ops.lora import LoraOptions
from moslim.plugin import Plugin, all_parts, part_callbacks, unchanged_on_failure
from moslim.policy.generation import BatchKey, OffPolicy, Purpose
from moslim.policy.hindsight import Hindsight, HindsightRelabeler, relabeler
from moslim.policy.policy_evaluation import Dtype, PolicyEvaluation
from moslim.policy.rehearsal import Rehearsal, rehearsal_texts
from moslim.policy.reward_functions import RewardFunction, RewardFunctions
from moslim.policy.rollout import Rollout, RolloutCollector
from moslim.policy.run_state import check_frozen, check_parts, rank_in, renew_critic, save_run, saved_run
from moslim.policy.shared_backbone import Share
from moslim.policy.update import (
    PolicyUpdate,
    check_accumulation_of_rollouts,
    level_offsets,
    progress_metrics,
    rollout_batches,
    rollout_metrics,
    warn_of_part_rollouts,
)
from moslim.preferences import PreferenceSet
from moslim.training.base_module import Stopwatch
from moslim.training.checkpointing import drop_frozen, restore_frozen
from moslim.training.distributed import averaged, shard_mesh
from moslim.training.identity import Entries
from moslim.training.lightning_compat import attached_trainer, keep_epoch_open
from moslim.training.optim import RateGroup, configure
from moslim.utils.errors import UsageError
from moslim.utils.files import due


class PolicyTrainer(PolicyEvaluation):
    """Trains a policy to follow the preference levels that its prompts request (MOSLIM, arXiv 2505.20336).

    For each training batch of prompts one rollout is made (:meth:`RolloutCollector.collect`), which is used for
    ``num_iterations * minibatches`` training steps (:meth:`PolicyUpdate.loss`); the data module repeats the batch that
    often. Random numbers depend on seed, epoch, batch, prompt and completion only, so a resumed run equals an
    uninterrupted one.

    Args:
        preferences: Dimensions that prompts can request; the classifier may have more.
        model: Hub name or folder of the causal language model to start from: any chat model, or an adapter (LoRA) of
            one, which is merged into it.
        classifier: Folder or Hub name of a trained reward classifier.
        mapping: Maps level probabilities and requested levels to rewards.
        policy_optimizer: Algorithm; computes advantages and loss, e.g. :class:`~moslim.algorithms.RLOO`.

        Model:
        lora: Options of a low-rank adapter; None = all weights are trained.
        base: Folder or Hub name of the base model of a ``model`` that is an adapter, where it is not at the place that
            the adapter names.
        dtype: Type of the weights. ``float64``, for comparisons, applies to the classifier too. ``bfloat16`` and
            ``float16`` need ``lora``, whose weights are float32, ``float16`` also ``trainer.precision: 16-mixed``.
        trust_remote_code: Whether code from the model's repository may run.

        Generation:
        engine: Sampling engine; None = :class:`~moslim.generation.TorchEngine`.
        num_generations: Completions per training prompt, ``n``.
        off_policy: Treatment of completions that another policy sampled; None = the defaults of
            :class:`~moslim.policy.OffPolicy`.

        Reward:
        reward_functions: Plain Python functions that reward completions beside the classifier.
        missing_eos_penalty: Deduction from the score of a completion that is truncated at the length limit.

        Optimisation:
        default_kl_coef: Weight of the exact KL(policy || reference) on prompts without instruction, which preserves
            the default behaviour.
        hindsight: Options of hindsight relabelling; None = no relabelling.
        rehearsal: Texts on which the policy is held close to the reference; None = none.
        num_iterations: Iterations over each rollout.
        minibatches: Training steps per iteration, each on all completions of a part of the prompts.
        optimizer: Callable from parameters to optimizer; None = AdamW with learning rate 1e-6, or 1e-5 with LoRA.
        lr_scheduler: Callable from optimizer to scheduler, stepped every optimizer step; None = constant rate.

        Evaluation:
        judge: Measures achieved levels in the test; None = the training classifier, marked ``proxy``. A judge that is
            not a learned model also judges training rollouts.
        eval_num_generations: Completions per prompt in validation and test.
        report: Folder for a copy of the test report, which is also written into the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.

        Resources:
        forward_config: Options of forward passes; None = the defaults of :class:`~moslim.policy.ForwardConfig`.
        share_backbone: Whether the classifier is an adapter on the policy's frozen base instead of a model of its own.
            This needs ``lora``, and a classifier that was trained with LoRA on the same base model and exported with
            ``--form adapter``. ``auto``: if these conditions hold.
        gradient_checkpointing: Whether activations are recomputed in the backward pass to save memory.
        liger: Whether policy and reference use Liger's fused kernels: CUDA only, ``pip install 'moslim[liger]'``.

        Resuming:
        reset_state: Whether a checkpoint with another class of mapping or policy optimizer is accepted; their state
            then starts anew.
        accept_changes: Options in which a checkpoint may differ from this run (:mod:`moslim.training.identity`); the
            error on a difference names them. The rollout in use is then made anew.
        seed: Seed of all random numbers.

    Raises:
        UsageError: An option is out of range, a dimension is unknown to the classifier, or the policy optimizer would
            not use the mapping's scalar.
    """

    batch_view: BatchView = PolicyView()

    def __init__(
        self,
        preferences: PreferenceSet,
        model: str,
        classifier: str,
        mapping: MappingFunction,
        policy_optimizer: PolicyOptimizer,
        lora: LoraOptions | None = None,
        base: str | None = None,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
        engine: RolloutEngine | None = None,
        num_generations: int = 8,
        off_policy: OffPolicy | None = None,
        reward_functions: list[RewardFunction] | None = None,
        missing_eos_penalty: float = 1.0,
        default_kl_coef: float = 0.0,
        hindsight: Hindsight | None = None,
        rehearsal: Rehearsal | None = None,
        num_iterations: int = 1,
        minibatches: int = 1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        judge: Judge | None = None,
        eval_num_generations: int = 4,
        report: str | None = None,
        predictions: str | None = None,
        forward_config: ForwardConfig | None = None,
        share_backbone: Share = "auto",
        gradient_checkpointing: bool = False,
        liger: bool = False,
        reset_state: bool = False,
        accept_changes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        off_policy, forward_config = off_policy or OffPolicy(), forward_config or ForwardConfig()
        counts = (num_generations, eval_num_generations, num_iterations, minibatches)
        if min(counts) < 1:
            raise UsageError(
                f"num_generations, eval_num_generations, num_iterations, minibatches are {counts}: give 1 or more"
            )
        if min(default_kl_coef, missing_eos_penalty) < 0:
            raise UsageError(
                f"default_kl_coef is {default_kl_coef}, missing_eos_penalty {missing_eos_penalty}: give 0 or more"
            )
        if policy_optimizer.aggregation == "normalize_then_sum" and not mapping.is_mean:
            raise UsageError(
                f"policy_optimizer.aggregation is normalize_then_sum, which adds up dimensions by itself, but "
                f"{type(mapping).__name__} makes a scalar of its own: set it to sum_then_normalize"
            )
        if policy_optimizer.weighs_completions and engine is not None and engine.cuts and off_policy.corrects:
            raise UsageError(
                f"engine.top_k and top_p leave tokens out, but {type(policy_optimizer).__name__} weighs whole "
                "completions: the weight of a long completion, the product of the kept probabilities of its tokens, is "
                "nearly 0. Set policy_optimizer.importance_sampling_level to token, or top_p to 1 and top_k to null"
            )
        super().__init__(
            preferences=preferences,
            model=model,
            classifier=classifier,
            engine=engine or TorchEngine(),
            judge=judge,
            eval_num_generations=eval_num_generations,
            lora=lora,
            base=base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            forward_config=forward_config,
            gradient_checkpointing=gradient_checkpointing,
            liger=liger,
            share_backbone=share_backbone,
            report=report,
            predictions=predictions,
            accept_changes=accept_changes,
            seed=seed,
            critic=policy_optimizer.critic,
        )
        self.mapping = mapping
        self.policy_optimizer = policy_optimizer
        self.engine = self.generator.engine
        self.reward_functions = RewardFunctions(reward_functions or [], preferences)
        self.num_generations = num_generations
        self.num_iterations = num_iterations
        self.minibatches = minibatches
        self.default_kl_coef = default_kl_coef
        self.missing_eos_penalty = missing_eos_penalty
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.reset_state = reset_state
        mapping.bind(preferences)
        self.collector = RolloutCollector(
            models=self.models,
            generator=self.generator,
            scorer=self.score,
            mapping=mapping,
            reward_functions=self.reward_functions,
            optimizer=policy_optimizer,
            forward_config=forward_config,
            off_policy=off_policy,
            num_generations=num_generations,
            missing_eos_penalty=missing_eos_penalty,
            seed=seed,
        )
        self.policy_update = PolicyUpdate(
            models=self.models,
            optimizer=policy_optimizer,
            engine=self.engine,
            forward_config=forward_config,
            num_generations=num_generations,
            default_kl_coef=default_kl_coef,
            importance_clip=off_policy.importance_clip,
            hindsight=hindsight,
        )
        self.rehearsal = rehearsal
        self._relabeler: HindsightRelabeler | None = None
        self.rollout: Rollout | None = None
        self.rows: Rollout | None = None  # minibatch of the current step
        self.logprobs: Tensor | None = None  # its log-probabilities [N, T] under the current weights
        self.step_loss: Tensor | None = None  # its loss in this process

    @property
    def batch_repeats(self) -> int:
        """Training steps per rollout; the data module yields each training batch that often."""
        return self.num_iterations * self.minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return max(1, self.batch_repeats // self.trainer.accumulate_grad_batches)

    def configure_callbacks(self) -> list[Callback]:
        """Adds mapping function and policy optimizer: the Trainer calls their hooks and saves their state.

        Raises:
            UsageError: One of them is listed in ``trainer.callbacks`` too, where Lightning would replace it.
        """
        parts = part_callbacks([self.mapping, self.policy_optimizer], self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*parts, *super().configure_callbacks()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        rate = 1e-5 if self.models.adapted else 1e-6
        options = self.policy_optimizer.critic
        apart = RateGroup(self.models.critic_parameters, options.lr, CRITIC_RATE) if options else None
        return configure(self, self.optimizer, self.lr_scheduler, self.parameters(), rate, apart)

    def setup(self, stage: str) -> None:
        """Moves the frozen reference and the classifier to the device.

        Raises:
            UsageError: An optimizer step would end in the middle of a rollout.
        """
        device = self.trainer.strategy.root_device  # the module itself has not been moved yet
        self.models.to(device, self.trainer.precision_plugin.convert_module)
        self.scorer.to(device)
        if self.models.policy.dtype == torch.float64 or self.trainer.precision == "64-true":
            self.scorer.classifier.double()
        self.scorer.reserve(self.instruction_patterns)
        self.date_classifier()
        if stage == "fit":
            check_accumulation_of_rollouts(self.trainer, self.batch_repeats)
            self.rollout = None  # of an earlier run; that of a checkpoint is restored later
            self._relabeler = relabeler(self.policy_update.hindsight, self.data, self.tokenizer)
            self.policy_update.rehearsal = rehearsal_texts(self.rehearsal, self.data, self.tokenizer, self.seed)

    def configure_model(self) -> None:
        """Shards the weights if the strategy does so.

        Raises:
            UsageError: The engine samples with copies of the policy.
        """
        mesh = shard_mesh(self)
        if mesh is None or self.models.sharded:
            return
        if not self.engine.in_process:
            raise UsageError(
                f"engine {type(self.engine).__name__} samples with copies of the policy's weights, which the strategy "
                "keeps in shards: take TorchEngine, or another strategy"
            )
        self.models.shard(mesh)
        self.strict_loading = all(p.requires_grad for p in self.parameters())  # frozen ones are in no checkpoint

    def on_train_start(self) -> None:
        """Warns if an epoch ends in the middle of a rollout."""
        super().on_train_start()
        warn_of_part_rollouts(self.trainer, self.batch_repeats)

    def on_after_backward(self) -> None:
        """Reshards the weights after the backward pass."""
        self.models.release()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Computes the loss of one minibatch. Makes a new rollout when a batch comes for the first time.

        Args:
            batch: Prompts of the rollout; the data module yields them ``batch_repeats`` times.
            batch_idx: Number of the batch in the epoch, repeats included.

        Returns:
            Scalar loss with gradient.
        """
        self.models.gather()
        # 1. Collect a rollout when its batch comes for the first time.
        key = (self.current_epoch, batch_idx // self.batch_repeats)
        if self.rollout is None or self.rollout.key != key:
            self.rollout = self._collect(batch, key)
        # 2. Select the minibatch, and all minibatches of the rollout that make one optimizer step with it.
        numbers, loss_scale = rollout_batches(self.trainer, batch_idx, self.batch_repeats)
        together = {number: self._minibatch(self.rollout, number % self.batch_repeats) for number in numbers}
        self.rows = together[batch_idx]
        # 3. Compute the loss. Lightning runs its backward pass and optimizer.step().
        clock = Stopwatch(self.device)
        first = self.rollout.version == self.global_step
        step = self.policy_update.loss(self.rows, list(together.values()), loss_scale, first, batch_idx)
        clock.lap("time/forward")
        self.logprobs, self.step_loss = step.logprobs, step.loss.detach()
        # 4. Log.
        if due(self.trainer):
            self.record_part(averaged(step.metrics), batch_idx)
            self.record(clock.durations)
        return step.loss

    def _minibatch(self, rollout: Rollout, step: int) -> Rollout:
        return rollout.minibatch(step, self.minibatches, self.num_generations, (self.seed, Purpose.SHUFFLE))

    def _collect(self, batch: PromptBatch, key: BatchKey) -> Rollout:
        """Makes and logs a rollout; restores the state of all plug-ins if that fails."""
        clock = Stopwatch(self.device)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = any(getattr(callback, "sees_nonfinite", False) for callback in callbacks)
        with unchanged_on_failure([*self._plugins, *([self._sampler] if self._sampler else [])]):
            rollout = self.collector.collect(
                batch, key, self.global_step, self.steps_per_rollout, self._sampler, watched, clock
            )
            if self._relabeler is not None:
                self._relabeler.relabel(rollout, batch.index.tolist(), self.seed)
                clock.lap("time/hindsight")
            self._log_rollout(rollout, clock)
        return rollout

    @torch.no_grad()
    def _log_rollout(self, rollout: Rollout, clock: Stopwatch) -> None:
        progress = averaged(progress_metrics(rollout))
        self.log_dict(progress, prog_bar=True, logger=False, batch_size=len(rollout))
        if due(self.trainer, self.steps_per_rollout):
            judge = self.exact_judge
            judged = judge.levels(rollout.questions, rollout.completion_texts).to(self.device) if judge else None
            metrics: dict[str, Tensor | float] = dict(rollout_metrics(rollout, self.preferences, judged))
            metrics |= level_offsets(rollout, self.preferences, judged)
            metrics |= self.reward_functions.metrics(rollout.per_dimension)
            sampled = self._sampler.metrics() if self._sampler else {}
            self.record({**progress, **averaged(metrics), **sampled, **clock.durations})

    @property
    def _plugins(self) -> list[Plugin]:
        """Mapping function and policy optimizer, with their children."""
        return all_parts([self.mapping, self.policy_optimizer])

    @property
    def _sampler(self) -> PreferenceSampler | None:
        """The data module's sampler of requested preferences; None without one."""
        sampler = getattr(getattr(self.trainer, "datamodule", None), "sampler", None)
        return sampler if isinstance(sampler, PreferenceSampler) else None

    def resumed_with(self) -> Entries:
        """See the base class."""
        return {
            "model.seed": self.seed,
            "model.num_generations": self.num_generations,
            "model.num_iterations": self.num_iterations,
            "model.minibatches": self.minibatches,
            **super().resumed_with(),
        }

    def settings(self) -> dict[str, Any]:
        """Options for the report by which results are compared, without paths, times and versions."""
        optimizer, source = self.policy_optimizer, self.collector.completion_source
        hindsight = self.policy_update.hindsight
        options = {name: value for name, value in vars(optimizer).items() if isinstance(value, (int, float))}
        return {
            "mapping": type(self.mapping).__name__,
            "policy_optimizer": {"name": type(optimizer).__name__, **options},
            "instruction": type(getattr(self.data, "instruction", None)).__name__,
            "sampler": type(getattr(self.data, "sampler", None)).__name__,
            "scramble": bool(getattr(self.data, "scramble", False)),
            "default_kl_coef": self.default_kl_coef,
            "missing_eos_penalty": self.missing_eos_penalty,
            "hindsight": None if hindsight is None else asdict(hindsight),
            "rehearsal": None if self.rehearsal is None else self.rehearsal.settings(),
            "num_generations": self.num_generations,
            "eval_num_generations": self.eval_num_generations,
            "temperature": self.engine.temperature,
            "max_new_tokens": self.engine.max_new_tokens,
            "completion_source": None if source is None else type(source).__name__,
            "seed": self.seed,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves trained weights, the rollout in use, and the options that the run must be resumed with."""
        keep_epoch_open(self.trainer, checkpoint)
        drop_frozen(self, checkpoint)
        save_run(checkpoint, self._plugins, self.models, self.scorer.classifier, self.rollout)
        self.keep_identity(checkpoint)
        self.models.gather_again()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores frozen weights and the rollout in use.

        Raises:
            UsageError: The checkpoint was made with another mapping, policy optimizer, model, classifier or data, or
                with other options that change the meaning of its weights.
        """
        run, trainer = saved_run(checkpoint), attached_trainer(self)
        check_parts(run, self._plugins, self.models, self.reset_state)
        changed = self.check_identity(checkpoint) - {"data.batch_size"}
        check_frozen(run, self.models, self.scorer.classifier)
        if self.reset_state:
            renew_critic(checkpoint, self.state_dict(), trainer is not None and trainer.state.fn == "fit")
        rank = rank_in(checkpoint)
        if rank is not None and run["rollouts"][rank] is not None and not changed:
            # the module may be moved to that device only after this
            device = self.device if trainer is None else trainer.strategy.root_device
            self.rollout = Rollout.from_state(run["rollouts"][rank], device)
        restore_frozen(self, checkpoint)
