"""Training of one policy towards the levels that its prompts ask for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moslim.checkpoints import drop_frozen, keep_plain_hparams, restore_frozen
from moslim.data.types import PromptBatch, View
from moslim.errors import UsageError
from moslim.evaluation.judges import Judge
from moslim.identity import Entries
from moslim.lora import LoraOptions
from moslim.mapping.base import MappingFunction
from moslim.models import eos_ids, fuse_kernels, load_causal_lm
from moslim.optim import RateGroup, configure
from moslim.packing import AnswerBatch
from moslim.plugin import own_callbacks, own_parts, unchanged_on_failure
from moslim.policy.answering import Answerer, Answers, BatchKey, Purpose
from moslim.policy.critic import CRITIC_RATE
from moslim.policy.engines import RolloutEngine, TorchEngine
from moslim.policy.evaluation import PolicyEvaluation
from moslim.policy.logprobs import answer_logprobs
from moslim.policy.metrics import level_offsets, progress_metrics, rollout_metrics
from moslim.policy.off_policy import OffPolicy, reduced_precision, rounded_anew, staleness_metrics, with_logprobs
from moslim.policy.optimizers import PolicyOptimizer
from moslim.policy.passes import Passes
from moslim.policy.reward_functions import RewardFunction, RewardFunctions
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout
from moslim.policy.scoring import group_scores, map_rewards
from moslim.policy.sharing import Share, load_scorer
from moslim.policy.state import load_run, save_run
from moslim.policy.sweep import settings
from moslim.policy.update import check_accumulation_of_rollouts, forward, rollout_batches, warn_of_part_rollouts
from moslim.precision import full_precision
from moslim.preferences import PreferenceSet
from moslim.processes import any_process, averaged
from moslim.reporting import due
from moslim.sampling import PreferenceSampler
from moslim.sharding import shard_mesh
from moslim.timing import Stopwatch
from moslim.training.lightning_compat import keep_epoch_open

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


class CompletionSource(Protocol):
    """A callback that gives the completions of training batches in place of :meth:`PolicyTrainer.sample`.

    It sets the module's ``completion_source`` to itself.
    """

    def __call__(self, module: PolicyTrainer, batch: PromptBatch, key: BatchKey, /) -> tuple[Answers, int]:
        """Returns the completions of a batch, and the optimizer steps that the policy that sampled them had made."""


class PolicyTrainer(PolicyEvaluation):
    """Trains a policy whose prompts say which levels are wanted (MOSLIM, arXiv 2505.20336).

    A training batch of prompts is answered once and then used for ``batch_repeats`` training steps: the data module
    yields it that often. Everything drawn is a function of seed, epoch, batch, prompt and sample, so that a resumed
    run equals the uninterrupted one.

    Args:
        preferences: The dimensions that prompts can ask for; the classifier may have more.
        model: Hub name or folder of the causal language model to start from: any chat model, or an adapter (LoRA) of
            one, which is merged into it.
        classifier: Folder or Hub name of a trained reward classifier.
        mapping: From level probabilities and requested levels to rewards.
        policy_optimizer: From rewards to advantages and loss.
        engine: What samples answers; None = :class:`TorchEngine`.
        judge: What measures achieved levels in the test; None = the training classifier, marked ``proxy``. One that
            is not itself a model also judges training rollouts, beside the classifier.
        reward_functions: Plain Python functions that reward answers beside the classifier.
        samples_per_prompt: Answers to each training prompt, ``n``.
        eval_samples: Answers to each prompt in validation and test.
        inner_epochs: Passes over a rollout.
        minibatches: Training steps per pass, each on all answers to some of the prompts.
        passes: How log-probabilities of answers are computed; None = every fast way that the model allows.
        off_policy: What is done about answers that another policy sampled; None = corrected.
        default_kl_coef: Weight of the exact KL divergence to the reference on prompts without instruction, which
            keeps the behaviour that nobody asked to change.
        missing_end_penalty: What an answer's score loses when it is cut at the length limit.
        lora: Train a low-rank adapter; None = train all weights.
        share_backbone: Whether the classifier stands on the policy's frozen base, by an adapter of its own, instead of
            a second copy of it. It must have been trained with LoRA on the model that the policy starts from, and be
            exported with ``--form adapter``; ``lora`` must be given. ``auto``: if all that is so.
        optimizer: From parameters to optimizer; None = AdamW, rate 1e-6, or 1e-5 with LoRA.
        lr_scheduler: From optimizer to schedule, moved every step; None = a constant rate.
        report: Folder that receives a copy of the test's report, beside the one in the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
        gradient_checkpointing: Save memory by computing activations twice.
        liger: Use Liger's fused kernels for policy and reference: CUDA only, and ``pip install 'moslim[liger]'``.
        dtype: Of the weights; with ``float64``, which is for comparisons, the classifier has it too. Weights in
            ``bfloat16`` or ``float16`` cannot be trained, but low-rank adapters on them can, whose weights are float32;
            ``float16`` needs ``trainer.precision: 16-mixed`` besides.
        reset_state: Accept a checkpoint whose mapping or policy optimizer is of another class, and start these anew.
        base: Folder or Hub name of the base model of a ``model`` that is an adapter, where it is not at the place that
            the adapter names.
        trust_remote_code: Whether code from the model's repository may run.
        accept_changes: Options in which a checkpoint may differ from this run (:mod:`moslim.identity`); the error that
            compares them names them. A rollout in use is then made anew.
        seed: Seed of all that is drawn.

    Raises:
        UsageError: An option is out of range, a dimension is unknown to the classifier, or the policy optimizer would
            not use the mapping's scalar.
    """

    batch_view = View.POLICY

    def __init__(
        self,
        preferences: PreferenceSet,
        model: str,
        classifier: str,
        mapping: MappingFunction,
        policy_optimizer: PolicyOptimizer,
        engine: RolloutEngine | None = None,
        judge: Judge | None = None,
        reward_functions: list[RewardFunction] | None = None,
        samples_per_prompt: int = 8,
        eval_samples: int = 4,
        inner_epochs: int = 1,
        minibatches: int = 1,
        passes: Passes | None = None,
        off_policy: OffPolicy | None = None,
        default_kl_coef: float = 0.0,
        missing_end_penalty: float = 1.0,
        lora: LoraOptions | None = None,
        share_backbone: Share = "auto",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        report: str | None = None,
        predictions: str | None = None,
        gradient_checkpointing: bool = False,
        liger: bool = False,
        dtype: Dtype = "float32",
        reset_state: bool = False,
        base: str | None = None,
        trust_remote_code: bool = False,
        accept_changes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        keep_plain_hparams(self)
        counts = (samples_per_prompt, eval_samples, inner_epochs, minibatches)
        if min(counts) < 1:
            raise UsageError(
                f"samples_per_prompt, eval_samples, inner_epochs, minibatches are {counts}: give 1 or more"
            )
        if min(default_kl_coef, missing_end_penalty) < 0:
            raise UsageError(
                f"default_kl_coef is {default_kl_coef}, missing_end_penalty {missing_end_penalty}: give 0 or more"
            )
        if policy_optimizer.aggregation == "normalize_then_sum" and not mapping.is_mean:
            raise UsageError(
                f"policy_optimizer.aggregation is normalize_then_sum, which adds up dimensions by itself, but "
                f"{type(mapping).__name__} makes a scalar of its own: set it to sum_then_normalize"
            )
        if policy_optimizer.weighs_answers and engine is not None and engine.cuts and _corrects(off_policy):
            raise UsageError(
                f"engine.top_k and top_p leave tokens out, but {type(policy_optimizer).__name__} weighs whole answers: "
                "the weight of a long one, the product of what was left at each of its tokens, is nearly 0. Set "
                "policy_optimizer.ratio to token, or top_p to 1 and top_k to null"
            )
        self.preferences = preferences
        self.model_path = model
        self.base = base
        self.classifier_path = classifier
        self.mapping = mapping
        self.policy_optimizer = policy_optimizer
        self.engine = engine or TorchEngine()
        self.judge = judge
        self.reward_functions = RewardFunctions(reward_functions or [], preferences)
        self.samples_per_prompt = samples_per_prompt
        self.eval_samples = eval_samples
        self.inner_epochs = inner_epochs
        self.minibatches = minibatches
        self.passes = passes or Passes()
        self.off_policy = off_policy or OffPolicy()
        self.default_kl_coef = default_kl_coef
        self.missing_end_penalty = missing_end_penalty
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.report = report
        self.predictions = predictions
        self.reset_state = reset_state
        self.trust_remote_code = trust_remote_code
        self.accept_changes = accept_changes or []
        self.seed = seed

        start = load_causal_lm(model, trust_remote_code, getattr(torch, dtype), base)
        if liger:
            fuse_kernels(start)
        self.roles = Roles(start, lora, gradient_checkpointing, policy_optimizer.critic)
        self.policy, self.critic = self.roles.policy, self.roles.critic
        self.answerer = Answerer(self.engine, self.tokenizer, eos_ids(self.policy, self.tokenizer))
        self.scorer = load_scorer(classifier, share_backbone, self.roles, self.tokenizer)
        self.columns = preferences.columns_in(self.scorer.preferences, f"classifier in {classifier}")
        mapping.bind(preferences)
        if judge is not None:
            judge.setup(preferences)
        self.completion_source: CompletionSource | None = None
        self.rollout: Rollout | None = None
        self.rows: Rollout | None = None  # the part of it that the current step learns from ...
        self.logprobs: Tensor | None = None  # ... its log-probabilities [N, T] under the current weights ...
        self.step_loss: Tensor | None = None  # ... and its loss, in this process

    @property
    def batch_repeats(self) -> int:
        """How often the data module is to yield each training batch."""
        return self.inner_epochs * self.minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that learn from each rollout."""
        return max(1, self.batch_repeats // self.trainer.accumulate_grad_batches)

    def configure_callbacks(self) -> list[Callback]:
        """Also the mapping function and the policy optimizer: the Trainer calls their hooks and saves their state.

        Raises:
            UsageError: One of them is listed in ``trainer.callbacks`` too, where Lightning would replace it.
        """
        parts = own_callbacks([self.mapping, self.policy_optimizer], self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*parts, *super().configure_callbacks()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        rate = 1e-5 if self.roles.adapted else 1e-6
        options = self.policy_optimizer.critic
        apart = RateGroup(self.roles.critic_parameters, options.lr, CRITIC_RATE) if options else None
        return configure(self, self.optimizer, self.lr_scheduler, self.parameters(), rate, apart)

    def setup(self, stage: str) -> None:
        """Moves what is not trained beside the policy.

        Raises:
            UsageError: Gradient accumulation would mix answers of different policies in one step.
        """
        device = self.trainer.strategy.root_device  # the module itself has not been moved yet
        self.roles.to(device, self.trainer.precision_plugin.convert_module)
        self.scorer.to(device)
        if self.roles.policy.dtype == torch.float64 or self.trainer.precision == "64-true":
            self.scorer.classifier.double()
        self.scorer.reserve(self.instruction_patterns)
        self.date_classifier()
        if stage == "fit":
            self.rollout = None  # that of an earlier run; a checkpoint's is taken up after this
            check_accumulation_of_rollouts(self.trainer, self.batch_repeats)

    def teardown(self, stage: str) -> None:
        """Says what the classifier was not shown of the answers."""
        if self.scorer.taken_out.texts:
            warnings.warn(f"scored by the classifier: {self.scorer.taken_out}", stacklevel=2)

    def configure_model(self) -> None:
        """Puts the weights into shards, where the strategy wants that.

        Raises:
            UsageError: Answers are sampled with copies of the policy.
        """
        mesh = shard_mesh(self)
        if mesh is None or self.roles.sharded:
            return
        if not self.engine.in_process:
            raise UsageError(
                f"engine {type(self.engine).__name__} samples with copies of the policy's weights, which the strategy "
                "keeps in shards: take TorchEngine, or another strategy"
            )
        self.roles.shard(mesh)
        self.strict_loading = all(p.requires_grad for p in self.parameters())  # frozen ones are in no checkpoint

    def on_train_start(self) -> None:
        """Says where an epoch ends within a rollout, which is then used in part."""
        super().on_train_start()
        warn_of_part_rollouts(self.trainer, self.batch_repeats)

    def on_after_backward(self) -> None:
        """Ends the part of a step that needs whole weights."""
        self.roles.release()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """One (mini)batch of the current rollout; a new rollout is made when its batch comes for the first time."""
        self.roles.gather()
        key = (self.current_epoch, batch_idx // self.batch_repeats)
        if self.rollout is None or self.rollout.key != key:
            stateful = own_parts([self.mapping, self.policy_optimizer])
            with unchanged_on_failure([*stateful, *([self._sampler] if self._sampler else [])]):
                self.rollout = self._roll_out(batch, key)
        numbers, parts = rollout_batches(self.trainer, batch_idx, self.batch_repeats)
        together = {number: self._minibatch(self.rollout, number % self.batch_repeats) for number in numbers}
        rows = together[batch_idx]
        clock = Stopwatch(self.device)
        update, default_kl = forward(
            self.roles,
            rows,
            list(together.values()),
            parts=parts,
            length=self.engine.max_new_tokens,
            samples=self.samples_per_prompt,
            temperature=self.engine.temperature,
            passes=self.passes,
            entropy=self.policy_optimizer.needs_entropy,
            default_kl=self.default_kl_coef > 0,
            cap=self.off_policy.cap,
            untrained=self.rollout.version == self.global_step,
            in_process=self.engine.in_process,
        )
        with full_precision():
            found = self.policy_optimizer.loss(update)
        loss, metrics = found.loss, {f"train/{name}": value for name, value in found.metrics.items()}
        if default_kl is not None:
            loss = loss + self.default_kl_coef * default_kl
            metrics["train/default_kl"] = default_kl.detach()
        clock.lap("time/forward")
        self.rows, self.logprobs, self.step_loss = rows, update.logprobs.detach(), loss.detach()
        if due(self.trainer):
            metrics["train/loss"] = self.step_loss
            self.record_part(averaged(metrics), batch_idx)
            self.record(clock.laps)
        return loss

    def _minibatch(self, rollout: Rollout, step: int) -> Rollout:
        return rollout.minibatch(step, self.minibatches, self.samples_per_prompt, (self.seed, Purpose.SHUFFLE))

    def sample(self, model: Any, batch: PromptBatch, key: BatchKey) -> Answers:
        """Samples completions of a training batch with the policy or a copy of it."""
        keys = [(self.seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
        return self.answerer(model, batch, keys, self.samples_per_prompt, finite=False)

    @torch.no_grad()
    def _roll_out(self, batch: PromptBatch, key: BatchKey) -> Rollout:
        clock = Stopwatch(self.device)
        if self.completion_source is None:
            answers, staleness = self.sample(self.policy, batch, key), 0
        else:
            answers, version = self.completion_source(self, batch, key)
            staleness = self.global_step - version
        clock.lap("time/sample")
        probs = self.probabilities(answers)
        clock.lap("time/reward")
        found, optimizer = answers.completions, self.policy_optimizer
        rows, temperature = AnswerBatch(answers.input_ids, answers.attention_mask, found.mask), self.engine.temperature
        by_engine: Tensor | None = None
        if staleness or self.off_policy.old_logprobs == "recompute":
            found = with_logprobs(found, answer_logprobs(self.policy, rows, temperature, self.passes))
        elif self.steps_per_rollout > 1 and reduced_precision(self.policy):
            by_engine, anew = found.logprobs, answer_logprobs(self.policy, rows, temperature, self.passes)
            anew, sampler = rounded_anew(anew, by_engine, found.sampler_logprobs, self.engine.in_process)
            found = replace(found, logprobs=anew, sampler_logprobs=sampler)
        clock.lap("time/old")
        with_reference = optimizer.needs_reference
        reference = self.roles.reference_logprobs(rows, temperature, self.passes) if with_reference else None
        clock.lap("time/reference")
        critic = self.roles.values(rows, self.passes) if self.roles.critic is not None else None
        clock.lap("time/critic")
        targets = batch.targets.repeat_interleave(self.samples_per_prompt, dim=0)
        mapped = map_rewards(self.mapping, self._sampler, probs, targets, self.samples_per_prompt)
        with full_precision():
            checked = self.reward_functions(answers, targets, batch.columns)
            mapped = self.reward_functions.join(mapped, checked, self.mapping.is_mean)
            scores = group_scores(mapped, found, reference, critic, self.missing_end_penalty, self.samples_per_prompt)
            returns, advantages, used = optimizer.returns(scores), optimizer.advantages(scores), optimizer.used(scores)
        rollout = Rollout(
            key=key,
            input_ids=answers.input_ids,
            attention_mask=answers.attention_mask,
            mask=found.mask,
            old_logprobs=found.logprobs,
            reference_logprobs=reference,
            targets=targets,
            probs=probs,
            per_dimension=mapped.per_dimension,
            rewards=mapped.total,
            advantages=advantages.flatten(0, 1),
            used=used.flatten(),
            ended=found.ended,
            questions=answers.questions,
            answers=answers.texts,
            values=critic,
            returns=None if returns is None else returns.flatten(0, 1),
            sampler_logprobs=found.sampler_logprobs,
            engine_logprobs=by_engine,
            version=self.global_step,
        )
        self._refuse_nonfinite(rollout)
        optimizer.observe(scores)
        progress = averaged(progress_metrics(rollout))
        self.log_dict(progress, prog_bar=True, logger=False, batch_size=len(rollout))
        if due(self.trainer, self.steps_per_rollout):
            judge = self.exact_judge  # it reads texts, which takes a while: once
            judged = judge.levels(rollout.questions, rollout.answers).to(self.device) if judge else None
            metrics: dict[str, Tensor | float] = dict(rollout_metrics(rollout, self.preferences, judged))
            metrics |= level_offsets(rollout, self.preferences, judged)
            metrics |= self.reward_functions.metrics(rollout.per_dimension)
            metrics |= staleness_metrics(rollout, staleness)
            asked = self._sampler.metrics() if self._sampler else {}
            self.record({**progress, **averaged(metrics), **asked, **clock.laps})
        return rollout

    def _refuse_nonfinite(self, rollout: Rollout) -> None:
        """Stops all processes where one has numbers that are not finite, unless a callback sees to that.

        Raises:
            UsageError: There are such numbers.
        """
        if any(getattr(callback, "sees_nonfinite", False) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return
        reason = rollout.nonfinite()
        if any_process(reason is not None, self.device):
            raise UsageError(
                f"step {self.global_step}: {reason or 'a rollout of another process is not finite'}. Go on from an "
                "earlier checkpoint with a lower learning rate, or with trainer.gradient_clip_val; a reward or a level "
                "probability is the fault of mapping or classifier. With moslim.callbacks.Guards in "
                "trainer.callbacks such a step is kept, to be seen with `replay`"
            )

    @property
    def _sampler(self) -> PreferenceSampler | None:
        """What draws the requests of the training prompts, where a data module does."""
        sampler = getattr(getattr(self.trainer, "datamodule", None), "sampler", None)
        return sampler if isinstance(sampler, PreferenceSampler) else None

    def resumed_with(self) -> Entries:
        """See the base class."""
        return {
            "model.seed": self.seed,
            "model.samples_per_prompt": self.samples_per_prompt,
            "model.inner_epochs": self.inner_epochs,
            "model.minibatches": self.minibatches,
            **super().resumed_with(),
        }

    def settings(self) -> dict[str, Any]:
        """What a result is to be compared by; it goes into the report."""
        return settings(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trained weights, the rollout in use, and a record of what the run must be resumed with."""
        keep_epoch_open(self.trainer, checkpoint)
        drop_frozen(self, checkpoint)
        save_run(self, checkpoint)
        self.roles.gather_again()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the weights and takes up the rollout.

        Raises:
            UsageError: The checkpoint belongs to another mapping, policy optimizer, start or classifier, or to one that
                stands on another backbone; or its weights or rows mean something else than this run believes.
        """
        load_run(self, checkpoint)
        restore_frozen(self, checkpoint)


def _corrects(off_policy: OffPolicy | None) -> bool:
    return off_policy is None or off_policy.cap is not None
