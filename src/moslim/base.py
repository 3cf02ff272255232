"""What the three modules have in common: a run's folder, the numbers of a step, the file that ``predict`` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.accumulation import StepCounts, check_accumulation, step_batches
from moslim.chat_templates import pin_tokenizer, tokenizer_pins
from moslim.errors import UsageError
from moslim.identity import Entries, check_identity, keep_identity, saved_entries, vocabulary_digest
from moslim.jsonlines import JsonLines
from moslim.reporting import shown


class RunModule(LightningModule):
    """Base of the modules. ``predict_step`` returns records, which are written in order to one file."""

    predictions: str | None = None
    """File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder."""

    accept_changes: Sequence[str] = ()
    """Options in which a checkpoint that is loaded may differ from this run (:mod:`moslim.identity`)."""

    never_accepted: ClassVar[tuple[str, ...]] = ()
    """Options in which it may not, whatever is accepted."""

    _writer: JsonLines | None = None

    def __init__(self) -> None:
        super().__init__()
        self.step_counts = StepCounts()
        """What the sums of a training batch are divided by."""
        self.recorded: dict[str, float] = {}
        """What :meth:`record` keeps until it is sent."""

    @property
    def run_folder(self) -> Path:
        """Folder of this run. Under several processes all must ask."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; a subclass says which it is."""
        raise NotImplementedError

    @property
    def data(self) -> Any:
        """The data module, if there is one."""
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def meaning(self) -> Entries:
        """What gives this module's weights their meaning. A subclass adds its own."""
        found, template = tokenizer_pins(self.tokenizer)
        entries: Entries = {"tokenizer": self._vocabulary, "chat_template": template}
        if self.data is not None:  # else nobody says what is put into the template
            entries |= {"data.template_args": found.arguments, "data.template_date": found.day}
        return entries | (self.data.meaning() if hasattr(self.data, "meaning") else {})

    def resumed_with(self) -> Entries:
        """What a run of this module must be resumed with. A subclass adds its own."""
        entries: Entries = {}
        if not any(isinstance(callback, GradientAccumulationScheduler) for callback in self._callbacks):
            entries["trainer.accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        return entries | (self.data.resumed_with() if hasattr(self.data, "resumed_with") else {})

    def keep_identity(self, checkpoint: dict[str, Any]) -> None:
        """Records in a checkpoint what it means and how its run goes on."""
        keep_identity(checkpoint, self.meaning(), self.resumed_with())

    def check_identity(self, checkpoint: dict[str, Any]) -> set[str]:
        """Takes the date of the checkpoint's run for the chat template's, and compares everything else.

        Returns:
            Options that differ and are accepted.

        Raises:
            UsageError: Other options differ.
        """
        saved = saved_entries(checkpoint)
        if hasattr(self.data, "take_date"):
            self.data.take_date(self.tokenizer, saved.get("data.template_date"))
        resumes = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        run = self.resumed_with() if resumes else {}
        path = None if self._trainer is None else self.trainer.ckpt_path
        changed = check_identity(checkpoint, self.meaning(), run, self.accept_changes, self.never_accepted, path)
        if self.data is None and "data.template_args" in saved:  # there is nobody who could say otherwise
            pin_tokenizer(self.tokenizer, saved["data.template_args"], saved["data.template_date"])
        return changed

    @property
    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined]  # set dynamically

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_digest(self.tokenizer)

    @property
    def was_trained(self) -> bool:
        """Whether ``fit`` took a step and was no dry run, so that there is something to save."""
        return self.trainer.global_step > 0 and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    @property
    def instruction_patterns(self) -> tuple[Any, ...]:
        """What a policy would read as an instruction; nothing where no data module writes one."""
        return getattr(getattr(self.trainer, "datamodule", None), "instruction_patterns", ())

    @property
    def predictions_file(self) -> Path:
        """The file that ``predict`` writes."""
        return Path(self.predictions) if self.predictions else self.run_folder / "predictions.jsonl"

    def on_train_start(self) -> None:
        """See :func:`check_accumulation`."""
        check_accumulation(self.trainer)

    def record(self, values: Mapping[str, Tensor | float]) -> None:
        """Keeps scalars of a training step for the loggers, which get all of a step that is shown in one row.

        For dozens of numbers: ``self.log`` holds each in a metric of its own, which takes up to half a millisecond.
        What it does beside, this does not: show numbers in the progress bar, or average them over an epoch.

        The row is sent before the module's own ``on_train_batch_end``.

        Args:
            values: By name; the same on all processes, or rank 0's are taken. ``trainer.callback_metrics`` has them at
                once.

        Raises:
            RuntimeError: Nothing would send them.
        """
        if not any(isinstance(callback, StepRow) for callback in self._callbacks):
            raise RuntimeError(
                f"{type(self).__name__}.configure_callbacks leaves out what its base class returns, which sends "
                "recorded numbers to the loggers: return [*super().configure_callbacks(), ...]"
            )
        figures = {name: float(value) for name, value in values.items()}
        self.recorded |= figures
        single = {name: torch.tensor(figure, dtype=torch.float32) for name, figure in figures.items()}
        self.trainer.callback_metrics.update(single)  # float32 whatever the run's precision, as Lightning's own

    def record_part(self, values: Mapping[str, Tensor | float], batch_idx: int) -> None:
        """Keeps scalars of one batch of a step: what is sent is their mean over the step's batches, as of its loss.

        Args:
            values: As in :meth:`record`; the same names for all batches of a step.
            batch_idx: Number of the batch in the epoch.
        """
        before = {} if batch_idx == step_batches(self.trainer, batch_idx).start else self.recorded
        parts = self.trainer.accumulate_grad_batches
        self.record({name: before.get(name, 0.0) + float(value) / parts for name, value in values.items()})

    def configure_callbacks(self) -> list[Callback]:
        """What sends the recorded numbers. A subclass adds its callbacks to these."""
        return [StepRow()]

    def open_predictions(self) -> JsonLines:
        """Begins the file of ``predictions``; a module that can go on with an interrupted one says so here."""
        return JsonLines(self.predictions_file)

    def on_predict_start(self) -> None:
        """Opens the file of ``predictions``.

        Raises:
            UsageError: There are several processes, which would write over one another.
        """
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file in order: run it in one process, with trainer.devices = 1")
        self._writer = self.open_predictions()

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Writes what ``predict_step`` returned."""
        if self._writer is not None:
            self._writer.write(outputs)

    def on_predict_end(self) -> None:
        """Puts the file in its place."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class StepRow(Callback):
    """Sends what a module recorded to the loggers, in one row for each step that is shown.

    The Trainer puts a module's own callbacks behind those of the config, so that these can record, too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier fit did not come to send."""
        cast(RunModule, pl_module).recorded = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sends the row, if an optimizer step has been made."""
        module = cast(RunModule, pl_module)
        if not module.recorded or not shown(trainer):
            return
        row, module.recorded = {**module.recorded, "epoch": trainer.current_epoch}, {}
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step - 1)  # steps count from 0, as in what Lightning logs
            logger.save()
