"""Causal language-model fine-tuning on question-answer text."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moslim.data.prompts import PairEncoder, pad, pad_id
from moslim.data.types import Example, PromptBatch, Question, Split, TextBatch
from moslim.data.views import ServedModule, TextView
from moslim.generation.base import RolloutEngine
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.adapters import adapter_base
from moslim.ops.loading import freeze_unread, save_as_trained
from moslim.ops.models import (
    Architecture,
    Positions,
    checkpoint_activations,
    eos_ids,
    fit_tokenizer,
    load_causal_lm,
    load_tokenizer,
)
from moslim.ops.numerics import derive_seed, widened
from moslim.policy.generation import CompletionGenerator
from moslim.preferences import Preference
from moslim.reward.classifier_export import is_classifier
from moslim.training.base_module import RunModule
from moslim.training.checkpointing import fingerprint, keep_plain_hparams, plain_options
from moslim.training.distributed import mean_over_processes
from moslim.training.identity import Entries, architecture
from moslim.training.lightning_compat import keep_epoch_open
from moslim.training.optim import configure, step_batches
from moslim.utils.errors import UsageError
from moslim.utils.folders import refuse_sources, whole_folder


class SupervisedTrainer(RunModule, ServedModule):
    """Fine-tunes a language model on answers, end-of-sequence token included, and saves it at the end of ``fit``.

    Args:
        model: Hub name or folder of a language model, or of an adapter of one, to start from.
        architecture: Architecture of a model with random weights to start from, instead of ``model``.
        output: Folder for the trained model, in Hugging Face format; None = ``model`` in the run's folder.
        engine: Engine that samples the completions of ``predict``; None = :class:`~moslim.generation.TorchEngine`.
        temperatures: Sampling temperatures of ``predict``, used in turn for successive questions; None = the engine's.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
        optimizer: Callable from parameters to optimizer; None = AdamW with learning rate 2e-5.
        lr_scheduler: Callable from optimizer to scheduler, stepped every optimizer step; None = constant rate.
        gradient_checkpointing: Whether activations are recomputed in the backward pass to save memory.
        base: Folder or Hub name of the base model of a ``model`` that is an adapter, where it is not at the place that
            the adapter names.
        trust_remote_code: Whether code from the model's repository may run.
        accept_changes: Options in which a checkpoint may differ from this run (:mod:`moslim.training.identity`); the
            error that compares them names them.
        seed: Seed of random weights, dropout and sampling.

    Raises:
        UsageError: Both or neither of ``model`` and ``architecture`` are given, or a temperature is negative.
    """

    batch_view: TextView = TextView()

    def __init__(
        self,
        model: str | None = None,
        architecture: Architecture | None = None,
        output: str | None = None,
        engine: RolloutEngine | None = None,
        temperatures: list[float] | None = None,
        predictions: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        base: str | None = None,
        trust_remote_code: bool = False,
        accept_changes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        keep_plain_hparams(self)
        if (model is None) == (architecture is None):
            raise UsageError("give either model (a Hub name or folder) or architecture (a model with random weights)")
        self.model_path = model
        self.architecture = architecture
        self.output = output
        self.engine = engine or TorchEngine()
        if any(not 0 <= temperature < math.inf for temperature in temperatures or []):
            raise UsageError(f"model.temperatures is {temperatures}: give finite numbers, 0 (greedy) or more")
        self.temperatures = temperatures or [self.engine.temperature]
        self.predictions = predictions
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.base = base
        self.trust_remote_code = trust_remote_code
        self.accept_changes = accept_changes or []
        self.seed = seed
        self.model = self._build().train()
        freeze_unread(self.model)
        if gradient_checkpointing:
            checkpoint_activations(self.model)
        self._answered = 0  # rows of this prediction so far: a completion is drawn by its row, whatever the batch size

    def _build(self) -> PreTrainedModel:
        if self.architecture is None:
            assert self.model_path is not None
            return load_causal_lm(self.model_path, self.trust_remote_code, base=self.base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed))
            return self.architecture.build(self.tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self.architecture is not None:
            return self.architecture.tokenizer.load()
        assert self.model_path is not None
        return load_tokenizer(self.model_path, self.trust_remote_code, self.base)

    @property
    def _name(self) -> str:
        return self.model_path or "the architecture"

    def setup(self, stage: str) -> None:
        """Checks that the model has an embedding of every token."""
        fit_tokenizer(self.tokenizer, self.model, self._name)

    def longest(self, wanted: int | None) -> int | None:
        """Most tokens of a pair, given the data module's limit; a pair that cannot be read is refused."""
        return Positions.of(self.model).longest(wanted, self._name)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        return configure(self, self.optimizer, self.lr_scheduler, self.model.parameters(), 2e-5)

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        """Seeds dropout by the training step."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def _loss(self, batch: TextBatch) -> Tensor:
        """Cross-entropy, summed over labelled tokens."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        known = _labelled(batch)
        return cross_entropy(widened(logits[:, :-1][known]), batch.labels[:, 1:][known], reduction="sum")

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """See Lightning. The step's loss is the mean over all labelled tokens of its batches and processes."""
        tokens = self.step_counts(self.trainer, batch, batch_idx, lambda texts: _labelled(texts).sum())
        loss = self._loss(batch) / tokens.where(tokens > 0, 1)
        self.record_part({"train/loss": mean_over_processes(loss)}, batch_idx)
        if batch_idx == step_batches(self.trainer, batch_idx)[-1]:
            self.log("train/loss", self.recorded["train/loss"], batch_size=1, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Logs ``val/loss``."""
        self._log_loss(batch, "val/loss")

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Logs ``test/loss``."""
        self._log_loss(batch, "test/loss")

    def _log_loss(self, batch: TextBatch, name: str) -> None:
        """Logs the mean over the labelled tokens of all batches and processes."""
        tokens = int(_labelled(batch).sum())
        self.log(name, self._loss(batch) / max(tokens, 1), batch_size=tokens, sync_dist=True)

    def answers(
        self,
        questions: list[Question],
        keys: list[tuple[int, ...]],
        temperature: float,
        preferences: Sequence[Preference | None] | None = None,
    ) -> list[str]:
        """Samples one completion per question.

        Args:
            questions: ``B`` questions; may be empty.
            keys: ``B`` keys of the random numbers.
            temperature: Sampling temperature.
            preferences: Levels that the instruction of each question requests; None = no instructions.
        """
        if not questions:
            return []
        wanted = getattr(self.data, "max_length", None)
        room = Positions.of(self.model).longest(None, self._name, self.engine.max_new_tokens)
        limits = [limit for limit in (wanted, room) if limit is not None]
        # The end token of the empty answer follows the prompt.
        encoder = self._encoder(min(limits) + 1 if limits else None, preferences)
        wanted = preferences or [None] * len(questions)
        rows = [encoder.spans(question, "", levels)[0] for question, levels in zip(questions, wanted, strict=True)]
        ids, mask = (x.to(self.device) for x in pad(rows, pad_id(self.tokenizer), left=True))
        nothing = torch.full((len(rows), 1), -1)
        batch = PromptBatch(ids, mask, nothing, torch.arange(len(rows)), questions, [""] * len(rows))
        engine = copy.copy(self.engine)
        engine.temperature = temperature
        generator = CompletionGenerator(engine, self.tokenizer, eos_ids(self.model, self.tokenizer))
        return generator(self.model, batch, [(self.seed, *key) for key in keys], 1).texts

    def _encoder(self, max_length: int | None, preferences: Sequence[Preference | None] | None) -> PairEncoder:
        """Encoder of the questions; it removes instructions in questions that receive one."""
        if not any(levels is not None for levels in preferences or []):
            return PairEncoder(self.tokenizer, max_length)
        return self.data.pair_encoder(max_length)

    def _wanted(self, rows: Iterable[Example]) -> list[Preference | None]:
        return [self.batch_view.preference(row, self.data.preferences, Split.PREDICT) for row in rows]

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Generates completions for the questions of a batch; the records are written to the file ``predictions``.

        The record of a prompt with instruction includes the ``requested`` levels.
        """
        numbers = range(self._answered, self._answered + len(batch.rows))
        self._answered = numbers.stop
        wanted = self._wanted(batch.rows)
        texts: dict[int, str] = {}
        for turn, temperature in enumerate(self.temperatures):
            mine = [n for n in numbers if n % len(self.temperatures) == turn]
            questions = [batch.rows[n - numbers.start].question for n in mine]
            levels = [wanted[n - numbers.start] for n in mine]
            texts |= zip(mine, self.answers(questions, [(n,) for n in mine], temperature, levels), strict=True)
        return [
            {
                "question": row.question,
                **({} if levels is None else {"requested": dict(levels.levels)}),
                "answer": texts[n],
            }
            for n, row, levels in zip(numbers, batch.rows, wanted, strict=True)
        ]

    def predictions_depend_on(self, rows: Callable[[], Iterable[Example]]) -> dict[str, Any]:
        """Weights, encoded questions and sampling options."""
        examples = list(rows())
        wanted = self._wanted(examples)
        encoder = self._encoder(None, wanted)
        digest = hashlib.sha256()
        for row, levels in zip(examples, wanted, strict=True):
            digest.update(repr(encoder.spans(row.question, "", levels)[0]).encode())
        return {
            "weights": fingerprint(self.model.state_dict()),
            "prompts": digest.hexdigest(),
            "engine": plain_options(self.engine),
            "temperatures": self.temperatures,
            "seed": self.seed,
            "batch_size": self.trainer.datamodule.eval_batch_size,  # type: ignore[attr-defined]
            "precision": f"{self.trainer.precision}, {self.model.dtype}",
        }

    def on_predict_start(self) -> None:
        """Opens the file ``predictions`` and continues after the rows that it holds."""
        super().on_predict_start()
        self._answered = self.rows_kept

    def on_fit_end(self) -> None:
        """Saves the model, unless nothing was trained or the run was a dry one."""
        folder = self.output or str(self.run_folder / "model")  # all processes must ask: the folder is broadcast
        if self.trainer.is_global_zero and self.was_trained:
            self.export(folder)

    def meaning(self) -> Entries:
        """See the base class."""
        return {"model.model": architecture(self.model.config), **super().meaning()}

    def resumed_with(self) -> Entries:
        """See the base class."""
        return {"model.seed": self.seed, **super().resumed_with()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the position inside the epoch, and the options that the run must be resumed with."""
        keep_epoch_open(self.trainer, checkpoint)
        self.keep_identity(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares model and data with those of the checkpoint.

        Raises:
            UsageError: The checkpoint was made with another model or with other data.
        """
        self.check_identity(checkpoint)

    def export(self, folder: str) -> None:
        """Saves model and tokenizer in Hugging Face format.

        Raises:
            UsageError: The folder holds the model that the run started from, or a classifier.
        """
        base = None if self.model_path is None else adapter_base(self.model_path, self.base)
        refuse_sources(folder, {"model.model": self.model_path, "model.base": base})
        with whole_folder(Path(folder), lambda place: not is_classifier(place)) as part:
            ends = sorted({*eos_ids(self.model, self.tokenizer), *self.engine.stop_ids})
            save_as_trained(self.model, part, self.engine, ends, pad_id(self.tokenizer))
            self.tokenizer.save_pretrained(part)


def _labelled(batch: TextBatch) -> Tensor:
    """``[B, T - 1]`` bool: the tokens from the second on that have a label."""
    return batch.labels[:, 1:] != -100
