"""Shows what the policy writes while it is trained, next to what it was asked for and what it got for it."""

from __future__ import annotations

import html
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from moslim.data.types import Question
from moslim.preferences import INACTIVE, PreferenceSet

if TYPE_CHECKING:
    import wandb

Row = dict[str, Any]


class JudgedAnswers(Protocol):
    """What the callback reads of a rollout: ``B`` answers, ``D`` dimensions."""

    @property
    def questions(self) -> Sequence[Question]: ...
    @property
    def answers(self) -> Sequence[str]: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def per_dimension(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def answer_advantages(self) -> Tensor: ...


class CompletionTable(Callback):
    """Prints some answers now and then, and keeps them all in ``completions.jsonl`` and in W&B where it is used.

    Args:
        every_n_steps: Optimizer steps between two tables; the first step is always shown.
        rows: Answers per table, spread evenly over the rollout.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 4) -> None:
        if every_n_steps < 1 or rows < 1:
            raise ValueError(f"every_n_steps={every_n_steps} and rows={rows} must both be at least 1")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._shown = 0
        self._file: Path | None = None
        self._table: wandb.Table | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "rollout"):
            raise TypeError(
                f"CompletionTable shows a policy's answers, and {type(pl_module).__name__} gives none: "
                "take it out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks must ask for the folder: the answer is broadcast. A fast_dev_run has none.
        folder = trainer.log_dir
        self._file = Path(folder) / "completions.jsonl" if folder else None
        self._shown = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == 1 or step % self.every_n_steps == 0
        if not due or step == self._shown or not trainer.is_global_zero:
            return
        self._shown = step
        table = table_rows(pl_module.rollout, pl_module.preferences, step, self.rows)  # type: ignore[arg-type]
        _print(trainer, render(table))
        if self._file is not None:
            append(self._file, table)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log(logger, table)

    def _log(self, logger: WandbLogger, rows: list[Row]) -> None:
        """One table for the whole run: every call adds rows to it, so that the dashboard keeps the history."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*(_escaped(value) for value in row.values()))
        logger.experiment.log({"completions": self._table, "trainer/global_step": rows[0]["step"]})


def table_rows(rollout: JudgedAnswers, preferences: PreferenceSet, step: int, count: int) -> list[Row]:
    """Takes ``count`` answers, evenly spread, as plain data; a dimension that was not asked for is left out."""
    names, total = preferences.names, len(rollout.answers)
    count = min(count, total)
    rows = []
    for i in (total * k // count for k in range(count)):
        targets, rewards = rollout.targets[i].tolist(), rollout.per_dimension[i].tolist()
        asked = [d for d, target in enumerate(targets) if target != INACTIVE]
        rows.append(
            {
                "step": step,
                "question": _text(rollout.questions[i]),
                "requested": {names[d]: preferences.dimensions[d].levels[targets[d]] for d in asked},
                "answer": rollout.answers[i],
                "rewards": {names[d]: _finite(rewards[d]) for d in asked},
                "reward": _finite(float(rollout.rewards[i])),
                "advantage": _finite(float(rollout.answer_advantages[i])),
            }
        )
    return rows


def append(file: Path, rows: list[Row]) -> None:
    """Adds rows to a JSON Lines file, which is created where it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def render(rows: list[Row], width: int = 120) -> str:
    """Lays rows out as a table. Model text is shown as it is: neither markup nor terminal codes work in it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Answers at step {rows[0]['step']}", box=box.SIMPLE_HEAD, show_lines=True, title_justify="left"
    )
    for column, ratio in (("requested", 3), ("question", 4), ("answer", 8)):
        table.add_column(column, ratio=ratio)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("advantage", justify="right", no_wrap=True)
    for row in rows:
        requested = "\n".join(
            f"{name}: {level} ({_signed(row['rewards'][name])})" for name, level in row["requested"].items()
        )
        cells = (requested or "nothing", _short(row["question"], 160), _short(row["answer"], 400))
        numbers = (_signed(row["reward"]), _signed(row["advantage"]))
        table.add_row(*map(Text, cells), *numbers)
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=sys.stdout.isatty()).print(table)
    return text.getvalue().rstrip()


def _print(trainer: Trainer, text: str) -> None:
    """Prints above the progress bar where there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        bar.print(text)
    else:
        print(text)


def _text(question: Question) -> str:
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def _short(text: str, limit: int) -> str:
    """One line without control characters, cut at ``limit``."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _escaped(value: Any) -> Any:
    """A cell for W&B, whose tables show HTML."""
    if isinstance(value, dict):
        value = ", ".join(f"{name}: {item}" for name, item in value.items())
    return html.escape(value) if isinstance(value, str) else value


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
