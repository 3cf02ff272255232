"""Training of one policy towards the levels that its prompts ask for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.base import RunModule
from moslim.checkpoints import drop_frozen, keep_epoch_open, keep_plain_hparams, restore_frozen
from moslim.data.types import PromptBatch, Question, View
from moslim.evaluation.judges import Judge
from moslim.evaluation.report import scalars
from moslim.evaluation.steerability import measures, steerability
from moslim.lora import LoraOptions, merged
from moslim.mapping.base import MappedReward, MappingFunction
from moslim.models import eos_ids, load_causal_lm, load_tokenizer
from moslim.noise import derive_seed
from moslim.optim import configure
from moslim.plugin import own_callbacks
from moslim.policy.answering import Answerer, Answers
from moslim.policy.engines import RolloutEngine, TorchEngine
from moslim.policy.kl import k1
from moslim.policy.logprobs import answer_logprobs
from moslim.policy.metrics import rollout_metrics
from moslim.policy.optimizers import GroupScores, PolicyOptimizer
from moslim.policy.packing import AnswerBatch, Passes
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout, end_penalty
from moslim.policy.state import load_run, save_run
from moslim.policy.sweep import TRAINING_CLASSIFIER, Sweep, publish, settings
from moslim.policy.update import forward
from moslim.preferences import Preference, PreferenceSet
from moslim.reward.scorer import Scorer
from moslim.timing import Stopwatch

Dtype = Literal["float32", "bfloat16", "float16"]
_TRAIN, _EVALUATE, _PREDICT, _SHUFFLE = range(4)  # what a seed is for


class PolicyTrainer(RunModule):
    """Trains a policy whose prompts say which levels are wanted (MOSLIM, arXiv 2505.20336).

    A training batch of prompts is answered once and then used for ``batch_repeats`` training steps: the data module
    yields it that often. Everything drawn is a function of seed, epoch, batch, prompt and sample, so that a resumed
    run equals the uninterrupted one.

    Args:
        preferences: The dimensions that prompts can ask for; the classifier may have more.
        model: Hub name or folder of the causal language model to start from: any chat model.
        classifier: Folder or Hub name of a trained reward classifier.
        mapping: From level probabilities and requested levels to rewards.
        policy_optimizer: From rewards to advantages and loss.
        engine: What samples answers; None = :class:`TorchEngine`.
        judge: What measures achieved levels in the test; None = the training classifier, marked ``proxy``. One that
            is not itself a model also judges training rollouts, beside the classifier.
        samples_per_prompt: Answers to each training prompt, ``n``.
        eval_samples: Answers to each prompt in validation and test.
        inner_epochs: Passes over a rollout.
        minibatches: Training steps per pass.
        passes: How log-probabilities of answers are computed; None = every fast way that the model allows.
        default_kl_coef: Weight of the exact KL divergence to the reference on prompts without instruction, which
            keeps the behaviour that nobody asked to change.
        missing_end_penalty: What an answer's score loses when it is cut at the length limit.
        lora: Train a low-rank adapter; None = train all weights.
        optimizer: From parameters to optimizer; None = AdamW, rate 1e-6, or 1e-5 with LoRA.
        lr_scheduler: From optimizer to schedule, moved every step; None = a constant rate.
        report: Folder that receives a copy of the test's report, beside the one in the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
        gradient_checkpointing: Save memory by computing activations twice.
        dtype: Of the weights.
        reset_state: Accept a checkpoint whose mapping or policy optimizer is of another class, and start these anew.
        trust_remote_code: Whether code from the model's repository may run.
        seed: Seed of all that is drawn.

    Raises:
        ValueError: An option is out of range, or a dimension is unknown to the classifier.
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
        samples_per_prompt: int = 8,
        eval_samples: int = 4,
        inner_epochs: int = 1,
        minibatches: int = 1,
        passes: Passes | None = None,
        default_kl_coef: float = 0.0,
        missing_end_penalty: float = 1.0,
        lora: LoraOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        report: str | None = None,
        predictions: str | None = None,
        gradient_checkpointing: bool = False,
        dtype: Dtype = "float32",
        reset_state: bool = False,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        keep_plain_hparams(self)
        counts = (samples_per_prompt, eval_samples, inner_epochs, minibatches)
        if min(counts) < 1:
            raise ValueError(
                f"samples_per_prompt, eval_samples, inner_epochs, minibatches are {counts}: give 1 or more"
            )
        if min(default_kl_coef, missing_end_penalty) < 0:
            raise ValueError(
                f"default_kl_coef is {default_kl_coef}, missing_end_penalty {missing_end_penalty}: give 0 or more"
            )
        self.preferences = preferences
        self.model_path = model
        self.mapping = mapping
        self.policy_optimizer = policy_optimizer
        self.engine = engine or TorchEngine()
        self.judge = judge
        self.samples_per_prompt = samples_per_prompt
        self.eval_samples = eval_samples
        self.inner_epochs = inner_epochs
        self.minibatches = minibatches
        self.passes = passes or Passes()
        self.default_kl_coef = default_kl_coef
        self.missing_end_penalty = missing_end_penalty
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.report = report
        self.predictions = predictions
        self.reset_state = reset_state
        self.trust_remote_code = trust_remote_code
        self.seed = seed

        start = load_causal_lm(model, trust_remote_code, getattr(torch, dtype))
        self.roles = Roles(start, lora, gradient_checkpointing)
        self.policy: Any = self.roles.policy
        self.answerer = Answerer(self.engine, self.tokenizer, eos_ids(self.policy, self.tokenizer))
        self.scorer = Scorer.from_pretrained(classifier)
        self._columns = preferences.columns_in(self.scorer.preferences, f"classifier in {classifier}")
        mapping.bind(preferences)
        if judge is not None:
            judge.setup(preferences)
        self.rollout: Rollout | None = None
        self._sweep = Sweep()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return load_tokenizer(self.model_path, self.trust_remote_code)

    @property
    def batch_repeats(self) -> int:
        """How often the data module is to yield each training batch."""
        return self.inner_epochs * self.minibatches

    def configure_callbacks(self) -> list[Callback]:
        """The mapping function and the policy optimizer: the Trainer calls their hooks and saves their state.

        Raises:
            ValueError: One of them is listed in ``trainer.callbacks`` too, where Lightning would replace it.
        """
        return own_callbacks([self.mapping, self.policy_optimizer], self.trainer.callbacks)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        rate = 1e-5 if self.roles.adapted else 1e-6
        return configure(self, self.optimizer, self.lr_scheduler, self.policy.parameters(), rate)

    def setup(self, stage: str) -> None:
        """Moves what is not trained beside the policy.

        Raises:
            ValueError: Gradient accumulation would mix answers of different policies in one step.
        """
        self.roles.to(self.device)
        self.scorer.to(self.device)
        data: Any = getattr(self.trainer, "datamodule", None)
        self.scorer.reserve(data.instruction.reserved if hasattr(data, "instruction") else ())
        if stage == "fit":
            self.rollout = None  # that of an earlier run; a checkpoint's is taken up after this
        accumulate = self.trainer.accumulate_grad_batches
        if stage == "fit" and self.batch_repeats % accumulate and accumulate % self.batch_repeats:
            raise ValueError(
                f"accumulate_grad_batches = {accumulate} must divide inner_epochs * minibatches = "
                f"{self.batch_repeats}, or be a multiple of it: an optimizer step would end in the middle of a rollout"
            )

    # Training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """One (mini)batch of the current rollout; a new rollout is made when its batch comes for the first time."""
        key = (self.current_epoch, batch_idx // self.batch_repeats)
        if self.rollout is None or self.rollout.key != key:
            self.rollout = self._roll_out(batch, key)
        rows = self._minibatch(self.rollout, batch_idx % self.batch_repeats)
        clock = Stopwatch(self.device)
        held = self.default_kl_coef > 0
        now = forward(self.policy, self.roles, rows, self.engine.temperature, self.passes, held)
        parts = self.policy_optimizer.loss(
            now.logprobs,
            rows.old_logprobs,
            rows.reference_logprobs,
            rows.advantages,
            rows.mask,
            self.engine.max_new_tokens,
        )
        loss, metrics = parts.loss, {f"train/{name}": value for name, value in parts.metrics.items()}
        metrics["train/entropy"] = now.entropy.detach()
        if now.default_kl is not None:
            loss = loss + self.default_kl_coef * now.default_kl
            metrics["train/default_kl"] = now.default_kl.detach()
        clock.lap("time/forward")
        self.log_dict({"train/loss": loss.detach(), **metrics, **clock.laps}, batch_size=len(rows))
        return loss

    def _minibatch(self, rollout: Rollout, step: int) -> Rollout:
        if self.minibatches == 1:
            return rollout
        if self.minibatches > len(rollout):
            raise ValueError(f"minibatches is {self.minibatches}, but a rollout has only {len(rollout)} answers")
        epoch, part = divmod(step, self.minibatches)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _SHUFFLE, *rollout.key, epoch))
        order = torch.randperm(len(rollout), generator=generator)
        return rollout.rows(order.tensor_split(self.minibatches)[part].to(self.device))

    @torch.no_grad()
    def _roll_out(self, batch: PromptBatch, key: tuple[int, int]) -> Rollout:
        clock = Stopwatch(self.device)
        keys = [(self.seed, _TRAIN, *key, index) for index in batch.index.tolist()]
        answers = self.answerer(self.policy, batch, keys, self.samples_per_prompt)
        clock.lap("time/sample")
        probs = self._probabilities(answers)
        clock.lap("time/reward")
        reference = self._reference_logprobs(answers)
        clock.lap("time/reference")
        targets = batch.targets.repeat_interleave(self.samples_per_prompt, dim=0)
        mapped = self._map(probs, targets)
        found = answers.completions
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
            advantages=self._advantages(mapped, answers, reference),
            ended=found.ended,
            questions=answers.questions,
            answers=answers.texts,
        )
        counted = self.judge if self.judge is not None and not self.judge.proxy else None
        metrics = rollout_metrics(rollout, self.preferences, counted)
        self.log_dict({**metrics, **clock.laps}, batch_size=len(rollout))
        return rollout

    def _probabilities(self, answers: Answers) -> Tensor:
        """``[N, D, K]`` level probabilities in the order of ``preferences``."""
        return self.scorer.probabilities(answers.questions, answers.texts)[:, self._columns]

    def _reference_logprobs(self, answers: Answers) -> Tensor | None:
        if not self.policy_optimizer.needs_reference:
            return None
        with self.roles.reference() as reference:
            batch = AnswerBatch(answers.input_ids, answers.attention_mask, answers.completions.mask)
            return answer_logprobs(reference, batch, self.engine.temperature, self.passes)

    def _map(self, probs: Tensor, targets: Tensor) -> MappedReward:
        """Rewards of this process's answers; the mapping sees those of all, and so needs not know of processes."""
        everyone: Any = (probs, targets)
        if self.trainer.world_size > 1:
            everyone = [values.flatten(0, 1) for values in self.all_gather(everyone)]
        all_probs, all_targets = everyone
        self.mapping.observe(all_probs, all_targets)
        groups = torch.arange(len(all_probs), device=self.device) // self.samples_per_prompt
        mapped = self.mapping(all_probs, all_targets, groups)
        own = slice(self.global_rank * len(probs), (self.global_rank + 1) * len(probs))
        return MappedReward(mapped.total[own], mapped.per_dimension[own])

    def _advantages(self, mapped: MappedReward, answers: Answers, reference: Tensor | None) -> Tensor:
        """``[N]`` advantages of this process's answers."""
        found, shape = answers.completions, (-1, self.samples_per_prompt)
        kl = torch.zeros_like(found.logprobs) if reference is None else k1(found.logprobs, reference) * found.mask
        scores = GroupScores(
            mapped.total.reshape(shape),
            mapped.per_dimension.reshape(*shape, len(self.preferences)),
            kl.sum(dim=1).reshape(shape),
            end_penalty(found.ended, self.missing_end_penalty).reshape(shape),
        )
        return self.policy_optimizer.advantages(scores).flatten()

    # Evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self, who: str, model: Any, batch: PromptBatch, judge: Judge | None) -> None:
        rows = zip(batch.index.tolist(), batch.targets.tolist(), strict=True)
        keys = [(self.seed, _EVALUATE, index, *(target + 1 for target in targets)) for index, targets in rows]
        answers = self.answerer(model, batch, keys, self.eval_samples)
        self._sweep.add(who, batch, answers, self._probabilities(answers), judge)

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted evaluation collected."""
        self._sweep.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers a small level sweep, judged by the training classifier, for the choice of checkpoints."""
        self._evaluate("policy", self.policy, batch, None)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures of steerability under ``val/``."""
        found = measures(self._sweep.gathered("policy"), self.preferences)
        values = {f"val/{name}": value for name, value in found["mean"].items()}
        for dimension, own in found["dimensions"].items():
            values |= {f"val/{dimension}/{name}": value for name, value in own.items()}
        self.log_dict({name: value for name, value in values.items() if value is not None})

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers the full sweep, with the policy and with what it started from, and has the answers judged."""
        self._evaluate("policy", self.policy, batch, self.judge)
        with self.roles.reference() as reference:
            self._evaluate("base", reference, batch, self.judge)

    def on_test_epoch_end(self) -> None:
        """Writes the steerability report into the run's folder, and a copy of it where ``report`` says."""
        policy, base = self._sweep.gathered("policy"), self._sweep.gathered("base")
        judge = self.judge.info if self.judge else TRAINING_CLASSIFIER
        result = steerability(policy, base, self.preferences, judge, settings(self))
        self.log_dict({k: v for k, v in scalars(result).items() if "/mean/" in k}, logger=False)
        folders = [self.run_folder, *([Path(self.report)] if self.report else [])]
        if self.trainer.is_global_zero:
            publish(self.trainer, result, folders)

    # Use --------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers the rows of a file; the records are written to the file of ``predictions``."""
        answers = self.answerer(self.policy, batch, [(self.seed, _PREDICT, i) for i in batch.index.tolist()], 1)
        return [
            {"question": question, "levels": dict(self.preferences.decode(target.cpu()).levels), "answer": text}
            for question, target, text in zip(answers.questions, batch.targets, answers.texts, strict=True)
        ]

    def answer(self, question: Question, levels: dict[str, int], samples: int = 1) -> list[str]:
        """Answers one question at the levels asked for; the data module says how they are written.

        Args:
            question: The question.
            levels: Wanted level (0 = lowest) by dimension name; may be empty.
            samples: Number of answers.
        """
        renderer = self.trainer.datamodule.renderer(self.tokenizer)  # type: ignore[attr-defined]
        preference = Preference(levels)
        targets = self.preferences.encode(preference)[None].to(self.device)
        ids = torch.tensor([renderer.ids(question, preference)], device=self.device)
        index = torch.zeros(1, dtype=torch.long, device=self.device)
        batch = PromptBatch(ids, torch.ones_like(ids), targets, index, [renderer.question(question)], [""])
        return self.answerer(self.policy, batch, [(self.seed, _PREDICT)], samples).texts

    def export(self, folder: str) -> None:
        """Saves the policy (adapter merged) and its tokenizer in Hugging Face format."""
        merged(self.policy).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trained weights, the rollout in use, and a record of what the run must be resumed with."""
        keep_epoch_open(self.trainer, checkpoint)
        drop_frozen(self, checkpoint)
        save_run(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the weights and takes up the rollout.

        Raises:
            ValueError: The checkpoint belongs to another mapping, policy optimizer, start or classifier.
        """
        restore_frozen(self, checkpoint)
        load_run(self, checkpoint)
