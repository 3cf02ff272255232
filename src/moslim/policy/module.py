"""Training of one policy towards the levels that its prompts ask for."""

from __future__ import annotations

import time
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.checkpoints import drop_frozen, fingerprint, keep_plain_hparams, restore_frozen
from moslim.data.prompts import pad_id
from moslim.data.types import PromptBatch, Question, View
from moslim.evaluation.judges import Judge, JudgeInfo
from moslim.evaluation.records import Records
from moslim.evaluation.report import log_report, scalars, write_report
from moslim.evaluation.steerability import measures, steerability
from moslim.evaluation.tables import summary_table
from moslim.lora import LoraOptions
from moslim.mapping.base import MappedReward, MappingFunction, requested_probability
from moslim.models import eos_ids, load_causal_lm, load_tokenizer
from moslim.noise import derive_seed
from moslim.optim import configure
from moslim.plugin import own_callbacks, own_parts
from moslim.policy.answering import Answers, answer, answer_seeds
from moslim.policy.engines import RolloutEngine, TorchEngine
from moslim.policy.kl import k1, k3
from moslim.policy.logprobs import completion_logits, full_kl, token_logprobs
from moslim.policy.optimizers import GroupScores, PolicyOptimizer
from moslim.policy.roles import Roles, evaluating
from moslim.policy.rollout import Rollout, end_penalty
from moslim.preferences import Preference, PreferenceSet
from moslim.reward.predictions import JsonLines
from moslim.reward.scorer import Scorer
from moslim.timing import Stopwatch

Dtype = Literal["float32", "bfloat16", "float16"]
_TRAIN, _EVALUATE, _PREDICT, _SHUFFLE, _DROPOUT = range(5)  # what a seed is for
_KEY = "policy_run"


class PolicyTrainer(LightningModule):
    """Trains a policy whose prompts say which levels are wanted (MOSLIM, arXiv 2505.20336).

    A training batch of prompts is answered once and then used for ``batch_repeats`` optimizer steps: the data module
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
        minibatches: Optimizer steps per pass.
        default_kl_coef: Weight of the exact KL divergence to the reference on prompts without instruction, which
            keeps the behaviour that nobody asked to change.
        missing_end_penalty: What an answer's score loses when it is cut at the length limit.
        lora: Train a low-rank adapter; None = train all weights.
        optimizer: From parameters to optimizer; None = AdamW, rate 1e-6, or 1e-5 with LoRA.
        lr_scheduler: From optimizer to schedule, moved every step; None = a constant rate.
        report: Folder that receives a copy of the test's report, beside the one in the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
        gradient_checkpointing: Save memory by computing activations twice.
        dtype: Of the weights, e.g. ``float32`` or ``bfloat16``.
        reset_state: Accept a checkpoint whose mapping or policy optimizer is of another class, and start these anew.
        trust_remote_code: Whether code from the model's repository may run.
        seed: Seed of all that is drawn.

    Raises:
        ValueError: Options contradict each other, or a dimension is unknown to the classifier.
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
        for name, value in (("samples_per_prompt", samples_per_prompt), ("eval_samples", eval_samples)):
            if value < 1:
                raise ValueError(f"model.{name} is {value}: give at least 1")
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
        self.default_kl_coef = default_kl_coef
        self.missing_end_penalty = missing_end_penalty
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.report = report
        self.predictions = predictions
        self.reset_state = reset_state
        self.trust_remote_code = trust_remote_code
        self.seed = seed

        loaded = load_causal_lm(model, trust_remote_code, getattr(torch, dtype))
        if gradient_checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
        self.roles = Roles(loaded, lora)
        self.policy: Any = self.roles.policy
        self._eos_ids = eos_ids(loaded, self.tokenizer)
        self._pad_id = pad_id(self.tokenizer)
        self.scorer = Scorer.from_pretrained(classifier)
        self._columns = preferences.columns_in(self.scorer.preferences, f"classifier in {classifier}")
        mapping.bind(preferences)
        if judge is not None:
            judge.setup(preferences)
        self.rollout: Rollout | None = None
        self._saved_rollouts: list[dict[str, Any] | None] = []
        self._records: dict[str, list[Records]] = {}
        self._writer: JsonLines | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return load_tokenizer(self.model_path, self.trust_remote_code)

    @property
    def batch_repeats(self) -> int:
        """How often the data module is to yield each training batch."""
        return self.inner_epochs * self.minibatches

    def configure_callbacks(self) -> list[Callback]:
        """The mapping function and the policy optimizer, so that the Trainer calls their hooks and saves their state.

        Raises:
            ValueError: One of them is listed in ``trainer.callbacks`` too, where Lightning would replace it.
        """
        return own_callbacks([self.mapping, self.policy_optimizer], self.trainer.callbacks)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        adapted = hasattr(self.policy, "peft_config")
        return configure(self, self.optimizer, self.lr_scheduler, self.policy.parameters(), 1e-5 if adapted else 1e-6)

    def setup(self, stage: str) -> None:
        """Moves what is not trained beside the policy.

        Raises:
            ValueError: Gradient accumulation would mix answers of different policies in one step.
        """
        self.roles.to(self.device)
        self.scorer.to(self.device)
        accumulate = self.trainer.accumulate_grad_batches
        if stage == "fit" and self.batch_repeats % accumulate and accumulate % self.batch_repeats:
            raise ValueError(
                f"accumulate_grad_batches = {accumulate} must divide inner_epochs * minibatches = {self.batch_repeats}, "
                "or be a multiple of it: an optimizer step would end in the middle of a rollout"
            )

    # ---------------------------------------------------------------------------------------------- training

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """One (mini)batch of the current rollout; a new rollout is made when its batch comes for the first time."""
        key = (self.current_epoch, batch_idx // self.batch_repeats)
        if self.rollout is None or self.rollout.key != key:
            self.rollout = self._roll_out(batch, key)
        rows = self._minibatch(self.rollout, batch_idx % self.batch_repeats)
        start = time.perf_counter()
        logits = self._logits(self.policy, rows)
        logprobs = token_logprobs(logits, rows.tokens, rows.mask)
        parts = self.policy_optimizer.loss(
            logprobs, rows.old_logprobs, rows.reference_logprobs, rows.advantages, rows.mask, self.engine.max_new_tokens
        )
        loss, metrics = parts.loss, {f"train/{name}": value for name, value in parts.metrics.items()}
        if self.default_kl_coef and rows.uninstructed.any():
            default_kl = self._default_kl(logits, rows)
            loss = loss + self.default_kl_coef * default_kl
            metrics["train/default_kl"] = default_kl.detach()
        seconds = torch.tensor(time.perf_counter() - start)
        self.log_dict({"train/loss": loss.detach(), **metrics, "time/loss": seconds}, batch_size=len(rows))
        return loss

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Makes dropout a function of the step."""
        torch.manual_seed(derive_seed(self.seed, _DROPOUT, self.current_epoch, batch_idx, self.global_rank))

    def _minibatch(self, rollout: Rollout, step: int) -> Rollout:
        if self.minibatches == 1:
            return rollout
        epoch, part = divmod(step, self.minibatches)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _SHUFFLE, *rollout.key, epoch))
        order = torch.randperm(len(rollout), generator=generator)
        return rollout.rows(order.chunk(self.minibatches)[part].to(self.device))

    def _logits(self, model: Any, rows: Rollout) -> Tensor:
        length = rows.mask.shape[1]
        return completion_logits(model, rows.input_ids, rows.attention_mask, length, self.engine.temperature)

    def _default_kl(self, logits: Tensor, rows: Rollout) -> Tensor:
        """Mean over the answer tokens of uninstructed prompts of the exact KL to the reference."""
        default = rows.rows(rows.uninstructed.nonzero()[:, 0])
        with torch.no_grad(), self.roles.reference() as reference:
            wanted = self._logits(reference, default)
        return full_kl(logits[rows.uninstructed][default.mask], wanted[default.mask]).mean()

    @torch.no_grad()
    def _roll_out(self, batch: PromptBatch, key: tuple[int, int]) -> Rollout:
        clock = Stopwatch()
        keys = [(self.seed, _TRAIN, *key, index) for index in batch.index.tolist()]
        answers = self._answer(self.policy, batch, keys, self.samples_per_prompt)
        clock.lap("time/sample")
        probs = self._probabilities(answers)
        clock.lap("time/reward")
        targets = batch.targets.repeat_interleave(self.samples_per_prompt, dim=0)
        mapped = self._map(probs, targets)
        reference = self._reference_logprobs(answers)
        clock.lap("time/reference")
        old, mask = answers.completions.logprobs, answers.completions.mask
        kl = torch.zeros_like(old) if reference is None else k1(old, reference) * mask
        shape = (-1, self.samples_per_prompt)
        scores = GroupScores(
            mapped.total.reshape(shape),
            mapped.per_dimension.reshape(*shape, len(self.preferences)),
            kl.sum(dim=1).reshape(shape),
            end_penalty(answers.completions.ended, self.missing_end_penalty).reshape(shape),
        )
        rollout = Rollout(
            key=key,
            input_ids=answers.input_ids,
            attention_mask=answers.attention_mask,
            mask=mask,
            old_logprobs=old,
            reference_logprobs=reference,
            targets=targets,
            probs=probs,
            per_dimension=mapped.per_dimension,
            rewards=mapped.total,
            advantages=self.policy_optimizer.advantages(scores).flatten(),
            ended=answers.completions.ended,
            questions=answers.questions,
            answers=answers.texts,
        )
        self._log_rollout(rollout, clock.laps)
        return rollout

    def _map(self, probs: Tensor, targets: Tensor) -> MappedReward:
        """Rewards of this process's answers; the mapping sees those of all, and so needs not know of processes."""
        everything = [self.all_gather(x).flatten(0, 1) if self.trainer.world_size > 1 else x for x in (probs, targets)]
        self.mapping.observe(*everything)
        groups = torch.arange(len(everything[0]), device=self.device) // self.samples_per_prompt
        mapped = self.mapping(*everything, groups)
        own = slice(self.global_rank * len(probs), (self.global_rank + 1) * len(probs))
        return MappedReward(mapped.total[own], mapped.per_dimension[own])

    def _reference_logprobs(self, answers: Answers) -> Tensor | None:
        if not self.policy_optimizer.needs_reference:
            return None
        tokens, mask = answers.completions.tokens, answers.completions.mask
        with self.roles.reference() as reference:
            logits = completion_logits(
                reference, answers.input_ids, answers.attention_mask, tokens.shape[1], self.engine.temperature
            )
        return token_logprobs(logits, tokens, mask)

    def _log_rollout(self, rollout: Rollout, seconds: dict[str, float]) -> None:
        metrics: dict[str, Any] = {
            "train/reward": rollout.rewards[~rollout.uninstructed].mean(),
            "train/length": rollout.mask.sum(dim=1).float().mean(),
            "train/ended": rollout.ended.float().mean(),
            **seconds,
        }
        if rollout.reference_logprobs is not None:
            difference = (rollout.old_logprobs, rollout.reference_logprobs)
            tokens = rollout.mask.sum()
            metrics["train/kl"] = (k1(*difference) * rollout.mask).sum(dim=1).mean()  # nats per answer
            metrics["train/kl_k3"] = (k3(*difference) * rollout.mask).sum() / tokens  # nats per token
        achieved = {"proxy": requested_probability(rollout.probs, rollout.targets)}
        if self.judge is not None and not self.judge.proxy:
            levels = self.judge.levels(rollout.questions, rollout.answers).to(self.device)
            hit = (levels == rollout.targets).float()
            achieved["gold"] = hit.masked_fill(rollout.targets < 0, torch.nan)
        for kind, values in achieved.items():
            metrics[f"train/{kind}"] = values.nanmean()
            metrics |= {
                f"train/{kind}/{name}": value
                for name, value in zip(self.preferences.names, values.nanmean(dim=0), strict=True)
                if not value.isnan()
            }
        known = {name: value for name, value in metrics.items() if value == value}  # no NaN when nothing was asked
        self.log_dict(known, batch_size=len(rollout))

    # ------------------------------------------------------------------------------------------- evaluation

    def _answer(self, model: Any, batch: PromptBatch, keys: list[tuple[int, ...]], samples: int) -> Answers:
        seeds = answer_seeds(keys, samples, self.device)
        with evaluating(model):
            return answer(self.engine, model, self.tokenizer, batch, seeds, self._eos_ids, self._pad_id)

    def _probabilities(self, answers: Answers) -> Tensor:
        """``[N, D, K]`` level probabilities in the order of ``preferences``."""
        return self.scorer.probabilities(answers.questions, answers.texts)[:, self._columns]

    @torch.no_grad()
    def _evaluate(self, model: Any, batch: PromptBatch, who: str, judge: Judge | None) -> None:
        keys = [
            (self.seed, _EVALUATE, index, *(target + 1 for target in targets))
            for index, targets in zip(batch.index.tolist(), batch.targets.tolist(), strict=True)
        ]
        samples = self.eval_samples
        answers = self._answer(model, batch, keys, samples)
        probs = self._probabilities(answers)
        judged = probs.argmax(dim=-1).float() if judge is None else judge.levels(answers.questions, answers.texts)
        targets = batch.targets.repeat_interleave(samples, dim=0)
        index = torch.arange(len(targets), device=self.device)
        records = Records(
            question=batch.index.repeat_interleave(samples),
            sample=index % samples,
            kinds=[kind for kind in batch.kinds for _ in range(samples)],
            targets=targets,
            achieved=judged.to(self.device),
            probs=probs,
            reward=self.mapping(probs, targets, index // samples).total,
        )
        self._records.setdefault(who, []).append(records)

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted validation collected."""
        self._records.clear()

    def on_test_epoch_start(self) -> None:
        """As before validation."""
        self._records.clear()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers a small level sweep, judged by the training classifier, for the choice of checkpoints."""
        self._evaluate(self.policy, batch, "policy", None)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures of steerability under ``val/``."""
        found = measures(self._gathered("policy"), self.preferences)
        values = {f"val/{name}": value for name, value in found["mean"].items()}
        for dimension, own in found["dimensions"].items():
            values |= {f"val/{dimension}/{name}": value for name, value in own.items()}
        self.log_dict({name: value for name, value in values.items() if value is not None}, rank_zero_only=True)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers the full sweep, with the policy and with what it started from, and has the answers judged."""
        self._evaluate(self.policy, batch, "policy", self.judge)
        with self.roles.reference() as reference:
            self._evaluate(reference, batch, "base", self.judge)

    def on_test_epoch_end(self) -> None:
        """Writes the steerability report into the run's folder, and a copy of it where ``report`` says."""
        policy, base = self._gathered("policy"), self._gathered("base")
        judge = self.judge.info if self.judge else JudgeInfo("training classifier", proxy=True)
        result = steerability(policy, base, self.preferences, judge, self._settings())
        self.log_dict({k: v for k, v in scalars(result).items() if "/mean/" in k}, rank_zero_only=True)
        folder = self._run_folder
        if self.trainer.is_global_zero:
            history = self._training_history()
            paths = write_report(result, folder, history)
            if self.report is not None:
                write_report(result, self.report, history)
            log_report(self.trainer.loggers, paths, result, self.global_step)
            print(summary_table(result))

    @property
    def _run_folder(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def _training_history(self) -> Path | None:
        """The metrics of the run that wrote the checkpoint under test."""
        path = self.trainer.ckpt_path
        metrics = Path(path).parent.parent / "metrics.csv" if path else None
        return metrics if metrics is not None and metrics.exists() else None

    def _gathered(self, who: str) -> Records:
        """The records of all processes, in canonical order."""
        own = Records.concat(self._records.pop(who, []))
        if self.trainer.world_size == 1:
            return own.canonical()
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, own.canonical())
        return Records.concat(parts).canonical()

    def _settings(self) -> dict[str, Any]:
        """What a result is to be compared by: no path, time or version."""
        return {
            "mapping": type(self.mapping).__name__,
            "policy_optimizer": type(self.policy_optimizer).__name__,
            "samples_per_prompt": self.samples_per_prompt,
            "eval_samples": self.eval_samples,
            "temperature": self.engine.temperature,
            "max_new_tokens": self.engine.max_new_tokens,
            "seed": self.seed,
        }

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers the rows of a file; the records are returned, and written to the file of ``predictions``."""
        keys = [(self.seed, _PREDICT, index) for index in batch.index.tolist()]
        answers = self._answer(self.policy, batch, keys, 1)
        records = [
            {"question": question, "levels": dict(self.preferences.decode(target.cpu()).levels), "answer": text}
            for question, target, text in zip(answers.questions, batch.targets, answers.texts, strict=True)
        ]
        if self._writer is not None:
            self._writer.write(records)
        return records

    def on_predict_start(self) -> None:
        """Opens the file of ``predictions``."""
        path = Path(self.predictions) if self.predictions else self._run_folder / "predictions.jsonl"
        self._writer = JsonLines(path)

    def on_predict_end(self) -> None:
        """Puts the file in its place."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def answer(self, question: Question, levels: dict[str, int], samples: int = 1) -> list[str]:
        """Answers one question at the levels asked for; the data module says how they are written.

        Args:
            question: The question.
            levels: Wanted level (0 = lowest) by dimension name; may be empty.
            samples: Number of answers.
        """
        renderer = self.trainer.datamodule.renderer(self.tokenizer)  # type: ignore[attr-defined]
        preference = Preference(levels)
        ids = torch.tensor([renderer.ids(question, preference)], device=self.device)
        batch = PromptBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            targets=self.preferences.encode(preference)[None].to(self.device),
            index=torch.zeros(1, dtype=torch.long, device=self.device),
            questions=[renderer.question(question)],
            kinds=[""],
        )
        return self._answer(self.policy, batch, [(self.seed, _PREDICT)], samples).texts

    # ------------------------------------------------------------------------------- checkpoints and export

    def export(self, folder: str) -> None:
        """Saves the policy (adapter merged) and its tokenizer in Hugging Face format."""
        adapted = hasattr(self.policy, "peft_config")
        merged = deepcopy(self.policy).merge_and_unload() if adapted else self.policy
        merged.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trained weights, the rollout in use, and what the run must be resumed with."""
        drop_frozen(self, checkpoint)
        states: list[Any] = [self.rollout.state() if self.rollout else None]
        if self.trainer.world_size > 1:
            own = states[0]
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = {
            "plugins": [part.state_key for part in own_parts([self.mapping, self.policy_optimizer])],
            "frozen": self._frozen_fingerprints(),
            "rollouts": states,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the weights and takes up the rollout.

        Raises:
            ValueError: The checkpoint belongs to another mapping, policy optimizer, start or classifier.
        """
        restore_frozen(self, checkpoint)
        saved = checkpoint.get(_KEY)
        if saved is None:
            return
        current = [part.state_key for part in own_parts([self.mapping, self.policy_optimizer])]
        if saved["plugins"] != current and not self.reset_state:
            raise ValueError(
                f"the checkpoint was trained with {saved['plugins']}, this run has {current}; "
                "set model.reset_state to true to start their state anew"
            )
        for role, value in self._frozen_fingerprints().items():
            if saved["frozen"][role] != value:
                raise ValueError(f"the {role} has other weights than the one this checkpoint was trained with")
        if len(saved["rollouts"]) == self.trainer.world_size and saved["rollouts"][self.global_rank] is not None:
            self.rollout = Rollout.from_state(saved["rollouts"][self.global_rank], self.device)

    def _frozen_fingerprints(self) -> dict[str, str]:
        with self.roles.reference() as reference:
            start = fingerprint({name: p.detach() for name, p in reference.named_parameters() if not p.requires_grad})
        return {"reference": start, "classifier": fingerprint(self.scorer.classifier.state_dict())}
