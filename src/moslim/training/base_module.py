"""Base class of the LightningModules: run folder, step metrics, timing and the file that ``predict`` writes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.chat_templates import pin_tokenizer, tokenizer_pins
from moslim.training.checkpoint_files import check_checkpoint, fitting
from moslim.training.identity import Entries, check_identity, keep_identity, saved_entries, vocabulary_digest
from moslim.training.lightning_compat import at_last_prediction, attached_trainer
from moslim.training.optim import FiniteWeights, PlateauSteps, StepCounts, check_accumulation, step_batches
from moslim.utils.errors import UsageError
from moslim.utils.files import JsonLines, finished, move_unfinished, shown


class Stopwatch:
    """Seconds per phase.

    Args:
        device: Device to synchronize at every lap, since CUDA kernels run asynchronously.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.durations: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Adds the time since the previous lap to the phase ``name``."""
        now = self._now()
        self.durations[name] = self.durations.get(name, 0.0) + now - self._last
        self._last = now

    def read(self) -> float:
        """Returns the seconds since the previous lap, without ending the phase."""
        return self._now() - self._last

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunModule(LightningModule):
    """Base of the LightningModules. The records that ``predict_step`` returns are written in order to one file."""

    predictions: str | None = None
    """File that ``predict`` writes; None = ``predictions.jsonl`` in the run folder."""

    accept_changes: Sequence[str] = ()
    """Options in which a loaded checkpoint may differ from this run (:mod:`moslim.training.identity`)."""

    never_accepted: ClassVar[tuple[str, ...]] = ()
    """Options in which it may not differ, even if they are in ``accept_changes``."""

    reports_test: ClassVar[bool] = False
    """True if ``test`` prints its own table, so that the command line does not list the metrics."""

    rows_kept: int = 0
    """Number of rows that ``predict`` skips, since an interrupted run has finished them."""

    _writer: JsonLines | None = None
    _depends_on: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.step_counts = StepCounts()
        """Denominators of the loss sums of a training batch."""
        self.recorded: dict[str, float] = {}
        """Values of :meth:`record` that are not logged yet."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint as Lightning does; refuses a damaged one, see :mod:`moslim.training.checkpoint_files`."""
        error_context: AbstractContextManager[None] = nullcontext()
        if isinstance(checkpoint_path, (str, Path)):
            check_checkpoint(checkpoint_path, weights_only is not False)
            error_context = fitting(checkpoint_path)
        with error_context:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )

    @property
    def run_folder(self) -> Path:
        """Folder of this run. Collective: every process must read it."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model; a subclass overrides it."""
        raise NotImplementedError

    @property
    def data(self) -> Any:
        """Data module of the Trainer; None if there is none."""
        return getattr(attached_trainer(self), "datamodule", None)

    def meaning(self) -> Entries:
        """Returns the options that give the weights their meaning. A subclass adds its own."""
        pins, template = tokenizer_pins(self.tokenizer)
        entries: Entries = {"tokenizer": self._vocabulary, "chat_template": template}
        if self.data is not None:  # the data module sets the arguments of the template
            entries |= {"data.template_args": pins.arguments, "data.template_date": pins.day}
        return entries | (self.data.meaning() if hasattr(self.data, "meaning") else {})

    def resumed_with(self) -> Entries:
        """Returns the options that a resumed run must keep. A subclass adds its own."""
        entries: Entries = {}
        if not any(isinstance(callback, GradientAccumulationScheduler) for callback in self._callbacks):
            entries["trainer.accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        return entries | (self.data.resumed_with() if hasattr(self.data, "resumed_with") else {})

    def keep_identity(self, checkpoint: dict[str, Any]) -> None:
        """Records :meth:`meaning` and :meth:`resumed_with` in a checkpoint."""
        keep_identity(checkpoint, self.meaning(), self.resumed_with())

    def check_identity(self, checkpoint: dict[str, Any]) -> set[str]:
        """Compares a checkpoint's recorded options with the current ones; adopts its date of the chat template.

        Returns:
            Options that differ and are in ``accept_changes``.

        Raises:
            UsageError: Other options differ.
        """
        saved = saved_entries(checkpoint)
        self.take_dates(saved)
        trainer = attached_trainer(self)
        is_resumed = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        run = self.resumed_with() if is_resumed else {}
        path = None if trainer is None else trainer.ckpt_path
        changed = check_identity(checkpoint, self.meaning(), run, self.accept_changes, self.never_accepted, path)
        if self.data is None and "data.template_args" in saved:  # no data module sets them
            pin_tokenizer(self.tokenizer, saved["data.template_args"], saved["data.template_date"])
        return changed

    def take_dates(self, saved: Entries) -> None:
        """Sets the date of chat templates that contain one to a checkpoint's, unless the data module sets another.

        Args:
            saved: Entries that the checkpoint recorded.
        """
        if hasattr(self.data, "take_date"):
            self.data.take_date(self.tokenizer, saved.get("data.template_date"))

    @property
    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined]  # set dynamically

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_digest(self.tokenizer)

    @property
    def was_trained(self) -> bool:
        """Whether ``fit`` took an optimizer step and was no dry run (``fast_dev_run``)."""
        return self.trainer.global_step > 0 and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    @property
    def instruction_patterns(self) -> tuple[Any, ...]:
        """Patterns that a policy would read as an instruction; empty without a data module that writes instructions."""
        return getattr(getattr(self.trainer, "datamodule", None), "instruction_patterns", ())

    @classmethod
    def starts_untrained(cls, options: Mapping[str, Any]) -> bool:
        """Whether the weights are untrained if no checkpoint is loaded.

        Args:
            options: Arguments given to the constructor.
        """
        return True

    @property
    def predictions_file(self) -> Path:
        """File that ``predict`` writes; by default in the run folder, or in ``outputs`` inside the working folder."""
        if self.predictions:
            return Path(self.predictions)
        folder = self.run_folder
        return (folder / "outputs" if folder.resolve() == Path.cwd() else folder) / "predictions.jsonl"

    def predictions_depend_on(self, rows: Callable[[], Iterable[Any]]) -> dict[str, Any]:
        """Returns the inputs of the records of ``predict`` as plain data, except those that :meth:`carried` returns.

        Args:
            rows: Returns an iterator over the rows of the data module.
        """
        return {}

    def carried(self, row: Any) -> dict[str, Any]:
        """Returns the fields of a row that its record contains."""
        return {}

    def rows_done(self, rows: Callable[[], Iterable[Any]], batch_size: int = 1, most: int | None = None) -> int:
        """Returns the number of rows that an interrupted ``predict`` has finished; the data module skips them.

        If ``predictions`` is None, the unfinished file of an earlier ``version_N`` of this run is resumed.

        Args:
            rows: Returns an iterator over all rows.
            batch_size: Only whole batches are kept, so that the remaining batches are those of an uninterrupted run.
            most: Maximum of the result; None = no maximum.
        """
        depends_on = self._depends_on = self.predictions_depend_on(rows)
        target = self.predictions_file
        self.rows_kept = 0
        for path in (target, *self._earlier_predictions()):
            num_finished = finished(path, depends_on, map(self.carried, rows()), quiet=path != target)
            if num_finished and (path == target or move_unfinished(path, target)):
                num_kept = num_finished if most is None else min(num_finished, most)
                self.rows_kept = num_kept - num_kept % batch_size
                rank_zero_info(f"{path}.part holds {num_finished} finished rows: resuming after {self.rows_kept}")
                break
        return self.rows_kept

    def _earlier_predictions(self) -> list[Path]:
        """Returns final paths of unfinished predictions in other versions of the run folder, newest version first."""
        if self.predictions:
            return []
        target = self.predictions_file
        paths = [part.with_suffix("") for part in target.parent.parent.glob(f"version_*/{target.name}.part")]
        versions = [path for path in paths if path != target and re.fullmatch(r"version_\d+", path.parent.name)]
        return sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_")), reverse=True)

    def on_train_start(self) -> None:
        """Checks gradient accumulation, see :func:`~moslim.training.optim.check_accumulation`."""
        check_accumulation(self.trainer)

    def record(self, values: Mapping[str, Tensor | float]) -> None:
        """Logs scalars of a training step; the loggers receive all scalars of a step in one row.

        Faster than ``self.log``, which holds each value in a metric of its own and takes up to 0.5 ms per value. It
        neither shows values in the progress bar nor averages them over an epoch.

        The row is logged before the module's own ``on_train_batch_end``.

        Args:
            values: Scalars by name; those of rank 0 are logged. They are in ``trainer.callback_metrics`` at once.

        Raises:
            RuntimeError: The module has no :class:`StepRow` callback, so nothing would be logged.
        """
        if not any(isinstance(callback, StepRow) for callback in self._callbacks):
            raise RuntimeError(
                f"{type(self).__name__}.configure_callbacks leaves out the callbacks of its base class, which log "
                "recorded values: return [*super().configure_callbacks(), ...]"
            )
        scalars = {name: float(value) for name, value in values.items()}
        self.recorded |= scalars
        metrics = {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
        self.trainer.callback_metrics.update(metrics)  # float32 at any precision of the run, as in Lightning

    def record_part(self, values: Mapping[str, Tensor | float], batch_idx: int) -> None:
        """Logs scalars of one batch of a step as their mean over the step's accumulated batches.

        Args:
            values: As in :meth:`record`; the same names for all batches of a step.
            batch_idx: Index of the batch in the epoch.
        """
        sums = {} if batch_idx == step_batches(self.trainer, batch_idx).start else self.recorded
        num_batches = self.trainer.accumulate_grad_batches
        self.record({name: sums.get(name, 0.0) + float(value) / num_batches for name, value in values.items()})

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callbacks that log recorded values, step a ``ReduceLROnPlateau`` and check the final weights."""
        return [StepRow(), PlateauSteps(), FiniteWeights()]

    def on_predict_start(self) -> None:
        """Opens the file of predictions.

        Raises:
            UsageError: There are several processes, which would overwrite each other's records.
        """
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file in order: run it in one process, with trainer.devices = 1")
        self._writer = JsonLines(self.predictions_file, self._depends_on, self.rows_kept)
        self._depends_on = None

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Writes the records that ``predict_step`` returned.

        Raises:
            SIGTERMException: The process received SIGTERM, and more batches follow.
        """
        if self._writer is None:
            return
        self._writer.write(outputs)
        if self.trainer.received_sigterm and not at_last_prediction(self.trainer):
            rank_zero_info(f"stopped by SIGTERM: the same command resumes {self._writer.path}.part")
            raise SIGTERMException

    def stop_predictions(self) -> None:
        """Closes the partial file of an interrupted ``predict``, which can be resumed."""
        if self._writer is not None:
            self._writer.stop()
            self._writer = None

    def on_predict_end(self) -> None:
        """Renames the complete file to its final path."""
        if self._writer is not None:
            self._writer.close()
            print(f"predictions written to {self._writer.path}")
            self._writer = None


class StepRow(Callback):
    """Logs the values that a module recorded, in one row per logged step.

    The Trainer runs a module's own callbacks after those of the config, so that the latter can record values, too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards values that an earlier fit did not log, and reports the number of trained parameters."""
        cast(RunModule, pl_module).recorded = {}
        parameters = list(pl_module.parameters())
        num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        num_parameters = sum(parameter.numel() for parameter in parameters)
        rank_zero_info(f"{num_trained:,} of {num_parameters:,} parameters are trained")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the file of unfinished predictions, so that a later run can resume it."""
        cast(RunModule, pl_module).stop_predictions()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the row at the end of an optimizer step that ``log_every_n_steps`` selects."""
        module = cast(RunModule, pl_module)
        if not module.recorded or not shown(trainer):
            return
        row, module.recorded = {**module.recorded, "epoch": trainer.current_epoch}, {}
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step - 1)  # from 0, as Lightning counts
            logger.save()
