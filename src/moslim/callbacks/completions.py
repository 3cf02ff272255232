"""Shows what the policy writes while it is trained, next to what it was asked for and what it got for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger

from moslim.callbacks.answers import Row, answer_rows, append, escaped, flat, write_parquet
from moslim.callbacks.tables import render
from moslim.errors import UsageError


class CompletionTable(Callback):
    """Prints some answers now and then, and keeps them all.

    They go to ``completions.jsonl`` in the run's folder at once, to ``completions.parquet`` when the run ends or is
    stopped, and to one growing table in W&B where it is used.

    Args:
        every_n_steps: Optimizer steps between two tables; the first step is always shown.
        rows: Answers per table, spread evenly over the rollout.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 4) -> None:
        if every_n_steps < 1 or rows < 1:
            raise UsageError(f"every_n_steps={every_n_steps} and rows={rows} must both be at least 1")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._shown = 0
        self._file: Path | None = None
        # A wandb.Table. Naming the class, even for type checkers only, has wandb imported when options are parsed.
        self._table: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "rollout"):
            raise UsageError(
                f"CompletionTable shows a policy's answers, and {type(pl_module).__name__} gives none: "
                "take it out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks must ask for the folder: the answer is broadcast. A fast_dev_run has none.
        folder = trainer.log_dir
        self._file = Path(folder) / "completions.jsonl" if folder else None
        self._shown = trainer.global_step
        self._table = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == 1 or step % self.every_n_steps == 0
        if not due or step == self._shown or not trainer.is_global_zero:
            return
        self._shown = step
        module: Any = pl_module
        rows = answer_rows(module.rollout, module.preferences, step, self.rows)
        _print(trainer, render(rows, f"Answers at step {step}", ("reward", "advantage")))
        if self._file is not None:
            append(self._file, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log(logger, [flat(row, module.preferences.names) for row in rows])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if self._file is not None and self._file.exists() and trainer.is_global_zero:
            write_parquet(self._file, module.preferences.names)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _log(self, logger: WandbLogger, rows: list[Row]) -> None:
        """One table for the whole run: every call adds rows to it, so that the dashboard keeps the history."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*map(escaped, row.values()))
        logger.experiment.log({"completions": self._table, "trainer/global_step": rows[0]["step"]})


def _print(trainer: Trainer, text: str) -> None:
    """Prints above the progress bar where there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        bar.print(text)
    else:
        print(text)
