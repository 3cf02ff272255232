"""Base class of the three LightningModules: run folder, step metrics, timing and the file that ``predict`` writes."""

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
        device: Waits for this device's queue at every lap; CUDA would otherwise be timed while it still works.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.durations: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Ends a phase that began with the last lap."""
        now = self._now()
        self.durations[name] = self.durations.get(name, 0.0) + now - self._last
        self._last = now

    def read(self) -> float:
        """Seconds since the last lap, which goes on."""
        return self._now() - self._last

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunModule(LightningModule):
    """Base of the modules. ``predict_step`` returns records, which are written in order to one file."""

    predictions: str | None = None
    """File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder."""

    accept_changes: Sequence[str] = ()
    """Options in which a checkpoint that is loaded may differ from this run (:mod:`moslim.training.identity`)."""

    never_accepted: ClassVar[tuple[str, ...]] = ()
    """Options in which it may not, whatever is accepted."""

    reports_test: ClassVar[bool] = False
    """``test`` prints its own table, so the command line does not list the metrics."""

    rows_kept: int = 0
    """Rows that this ``predict`` leaves out, since an interrupted one has finished them."""

    _writer: JsonLines | None = None
    _depends_on: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.step_counts = StepCounts()
        """Denominators of the sums of a training batch."""
        self.recorded: dict[str, float] = {}
        """Values of :meth:`record` that are not sent yet."""

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
        """Lightning's; a checkpoint that is not whole is refused, see :mod:`moslim.training.checkpoint_files`."""
        within: AbstractContextManager[None] = nullcontext()
        if isinstance(checkpoint_path, (str, Path)):
            check_checkpoint(checkpoint_path, weights_only is not False)
            within = fitting(checkpoint_path)
        with within:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )

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
        return getattr(attached_trainer(self), "datamodule", None)

    def meaning(self) -> Entries:
        """Options that give this module's weights their meaning. A subclass adds its own."""
        found, template = tokenizer_pins(self.tokenizer)
        entries: Entries = {"tokenizer": self._vocabulary, "chat_template": template}
        if self.data is not None:  # else nobody says what is put into the template
            entries |= {"data.template_args": found.arguments, "data.template_date": found.day}
        return entries | (self.data.meaning() if hasattr(self.data, "meaning") else {})

    def resumed_with(self) -> Entries:
        """Options that a run of this module must be resumed with. A subclass adds its own."""
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
        self.take_dates(saved)
        trainer = attached_trainer(self)
        resumes = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        run = self.resumed_with() if resumes else {}
        path = None if trainer is None else trainer.ckpt_path
        changed = check_identity(checkpoint, self.meaning(), run, self.accept_changes, self.never_accepted, path)
        if self.data is None and "data.template_args" in saved:  # there is nobody who could say otherwise
            pin_tokenizer(self.tokenizer, saved["data.template_args"], saved["data.template_date"])
        return changed

    def take_dates(self, saved: Entries) -> None:
        """Gives chat templates that ask for the date that of a checkpoint's run, unless the data module says another.

        Args:
            saved: What the checkpoint recorded.
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
        """Whether ``fit`` took a step and was no dry run, so that there is something to save."""
        return self.trainer.global_step > 0 and not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    @property
    def instruction_patterns(self) -> tuple[Any, ...]:
        """Patterns that a policy would read as an instruction; none where no data module writes one."""
        return getattr(getattr(self.trainer, "datamodule", None), "instruction_patterns", ())

    @classmethod
    def starts_untrained(cls, options: Mapping[str, Any]) -> bool:
        """Whether without a checkpoint the weights in use are those before training.

        Args:
            options: Arguments of the constructor that are given.
        """
        return True

    @property
    def predictions_file(self) -> Path:
        """The file that ``predict`` writes, by default never in the working folder itself."""
        if self.predictions:
            return Path(self.predictions)
        folder = self.run_folder
        return (folder / "outputs" if folder.resolve() == Path.cwd() else folder) / "predictions.jsonl"

    def predictions_depend_on(self, rows: Callable[[], Iterable[Any]]) -> dict[str, Any]:
        """Plain data that the records of ``predict`` depend on, besides what :meth:`carried` compares row by row.

        Args:
            rows: Begins a pass over the rows, as the data module hands them out.
        """
        return {}

    def carried(self, row: Any) -> dict[str, Any]:
        """The part of a row's record that comes from the row itself."""
        return {}

    def rows_done(self, rows: Callable[[], Iterable[Any]], batch_size: int = 1, most: int | None = None) -> int:
        """Number of rows whose records an interrupted ``predict`` left; the data module leaves them out.

        Without ``predictions``, what an earlier ``version_N`` of this run left is taken over.

        Args:
            rows: Begins a pass over all rows.
            batch_size: Only whole batches are kept, so that the others are those of an uninterrupted run.
            most: Most rows that may be kept.
        """
        depends_on = self._depends_on = self.predictions_depend_on(rows)
        place = self.predictions_file
        self.rows_kept = 0
        for path in (place, *self._earlier_predictions()):
            found = finished(path, depends_on, map(self.carried, rows()), quiet=path != place)
            if found and (path == place or move_unfinished(path, place)):
                kept = found if most is None else min(found, most)
                self.rows_kept = kept - kept % batch_size
                rank_zero_info(f"{path}.part holds {found} finished rows: going on after {self.rows_kept}")
                break
        return self.rows_kept

    def _earlier_predictions(self) -> list[Path]:
        """Places of unfinished predictions in other versions of the run's folder, the latest first."""
        if self.predictions:
            return []
        place = self.predictions_file
        parts = [part.with_suffix("") for part in place.parent.parent.glob(f"version_*/{place.name}.part")]
        versions = [path for path in parts if path != place and re.fullmatch(r"version_\d+", path.parent.name)]
        return sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_")), reverse=True)

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
        """Returns the callbacks that log recorded values, move a schedule and check the final weights."""
        return [StepRow(), PlateauSteps(), FiniteWeights()]

    def on_predict_start(self) -> None:
        """Opens the file of ``predictions``.

        Raises:
            UsageError: There are several processes, which would write over one another.
        """
        if self.trainer.world_size > 1:
            raise UsageError("predict writes one file in order: run it in one process, with trainer.devices = 1")
        self._writer = JsonLines(self.predictions_file, self._depends_on, self.rows_kept)
        self._depends_on = None

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Writes what ``predict_step`` returned.

        Raises:
            SIGTERMException: The process was told to stop, and there are more batches.
        """
        if self._writer is None:
            return
        self._writer.write(outputs)
        if self.trainer.received_sigterm and not at_last_prediction(self.trainer):
            rank_zero_info(f"stopped by SIGTERM: the same command goes on with {self._writer.path}.part")
            raise SIGTERMException

    def stop_predictions(self) -> None:
        """Closes what an interrupted ``predict`` has written so far."""
        if self._writer is not None:
            self._writer.stop()
            self._writer = None

    def on_predict_end(self) -> None:
        """Puts the file in its place."""
        if self._writer is not None:
            self._writer.close()
            print(f"predictions written to {self._writer.path}")
            self._writer = None


class StepRow(Callback):
    """Sends what a module recorded to the loggers, in one row for each step that is shown.

    The Trainer puts a module's own callbacks behind those of the config, so that these can record, too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier fit did not come to send, and says how much is trained."""
        cast(RunModule, pl_module).recorded = {}
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        rank_zero_info(f"{trained:,} of {sum(size for size, _ in sizes):,} parameters are trained")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves unfinished predictions to be gone on with."""
        cast(RunModule, pl_module).stop_predictions()

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
