"""Tables of completions for the console, files and W&B, and the setup of W&B runs.

Texts of the model are shown literally: markup, HTML and terminal codes in them have no effect.
"""

from __future__ import annotations

import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from moslim.data.types import Question
from moslim.ops.numerics import evenly_spaced
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.training.lightning_compat import set_wandb_run
from moslim.utils.errors import UsageError
from moslim.utils.files import whole_file, write_text

Row = dict[str, Any]
"""A completion as plain data; see :func:`completion_rows`."""


class JudgedCompletions(Protocol):
    """Attributes of a rollout that tables show: ``N`` completions, ``D`` dimensions, at most ``K`` levels."""

    @property
    def questions(self) -> Sequence[Question]: ...
    @property
    def completion_texts(self) -> Sequence[str]: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def probs(self) -> Tensor: ...
    @property
    def per_dimension(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def completion_advantages(self) -> Tensor: ...


def completion_rows(rollout: JudgedCompletions, preferences: PreferenceSet, step: int, count: int) -> list[Row]:
    """Returns ``count`` evenly spaced completions as plain data.

    ``requested`` and ``rewards`` hold the requested dimensions only, ``probabilities`` holds all dimensions.
    """
    names = preferences.names
    rows = []
    for i in evenly_spaced(len(rollout.completion_texts), count):
        targets, rewards = rollout.targets[i].tolist(), rollout.per_dimension[i].tolist()
        requested = [d for d, target in enumerate(targets) if target != INACTIVE]
        probs = dict(zip(names, rollout.probs[i].tolist(), strict=True))
        rows.append(
            {
                "step": step,
                "question": _question_text(rollout.questions[i]),
                "requested": {names[d]: preferences.dimensions[d].levels[targets[d]] for d in requested},
                "answer": rollout.completion_texts[i],
                "probabilities": {
                    dimension.name: [_finite(prob) for prob in probs[dimension.name][: len(dimension.levels)]]
                    for dimension in preferences.dimensions
                },
                "rewards": {names[d]: _finite(rewards[d]) for d in requested},
                "reward": _finite(float(rollout.rewards[i])),
                "advantage": _finite(float(rollout.completion_advantages[i])),
            }
        )
    return rows


def append_rows(file: Path, rows: list[Row]) -> None:
    """Appends rows to a JSON Lines file and creates it if necessary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def write_parquet(lines: Path, names: Sequence[str]) -> Path:
    """Writes the rows of a JSON Lines file to a parquet file beside it, with the fields of :func:`flatten`.

    Args:
        lines: File written by :func:`append_rows`.
        names: Names of the dimensions.

    Returns:
        Path of the parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    types = {"step": pyarrow.int64(), "reward": pyarrow.float64(), "advantage": pyarrow.float64()}
    for name in names:
        types |= {f"{name}/reward": pyarrow.float64(), f"{name}/probabilities": pyarrow.list_(pyarrow.float64())}
    with lines.open(encoding="utf-8") as stream:  # splitlines() would also split at other characters
        rows = [flatten(json.loads(line), names) for line in stream]
    schema = pyarrow.schema([(field, types.get(field, pyarrow.string())) for field in rows[0]])
    path = lines.with_suffix(".parquet")
    with whole_file(path) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), part)
    return path


def flatten(row: Row, names: Sequence[str]) -> Row:
    """Flattens a row: ``preference`` as text, and ``/requested``, ``/reward``, ``/probabilities`` per dimension.

    Args:
        row: Row from :func:`completion_rows`.
        names: Names of the dimensions.
    """
    preference = ", ".join(f"{name}: {level}" for name, level in row["requested"].items())
    fields: Row = {"step": row["step"], "question": row["question"], "preference": preference, "answer": row["answer"]}
    fields |= {"reward": row["reward"], "advantage": row["advantage"]}
    for name in names:
        fields[f"{name}/requested"] = row["requested"].get(name)
        fields[f"{name}/reward"] = row["rewards"].get(name)
        fields[f"{name}/probabilities"] = row["probabilities"][name]
    return fields


def wandb_cell(value: Any) -> Any:
    """Converts a cell for W&B, whose tables render HTML: escapes texts and formats lists of numbers."""
    if isinstance(value, list):
        return " ".join("-" if number is None else f"{number:.2f}" for number in value)
    return html.escape(value) if isinstance(value, str) else value


def _question_text(question: Question) -> str:
    """Formats a question as text: a chat as one line per message."""
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def _finite(value: float) -> float | None:
    """Rounds a number to six decimals; None if it is not finite."""
    return round(value, 6) if math.isfinite(value) else None


def render(rows: list[Row], title: str, number_keys: Sequence[str], width: int = 120) -> str:
    """Formats rows as a table for the console.

    Args:
        rows: Rows from :func:`completion_rows`; other numbers may be added to them.
        title: Text above the table.
        number_keys: Keys of the numbers to show.
        width: Width of the table in characters.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, show_lines=True, title_justify="left")
    for field, ratio in (("requested", 3), ("question", 4), ("answer", 8)):
        table.add_column(field, ratio=ratio)
    for key in number_keys:
        table.add_column(key, justify="right", no_wrap=True)
    for row in rows:
        requested = "\n".join(
            f"{name}: {level} ({_signed(row['rewards'][name])})" for name, level in row["requested"].items()
        )
        cells = (requested or "nothing", _shortened(row["question"], 160), _shortened(row["answer"], 400))
        table.add_row(*map(Text, cells), *(_signed(row[key]) for key in number_keys))
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=sys.stdout.isatty()).print(table)
    return text.getvalue().rstrip()


def _shortened(text: str, limit: int) -> str:
    """Returns a text as one line without control characters, cut at ``limit``."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _signed(value: float | None) -> str:
    """Formats a number with its sign; None becomes ``-``."""
    return "-" if value is None else f"{value:+.2f}"


class CompletionTable(Callback):
    """Prints and saves some completions of the policy during training, with their requests and rewards.

    They are appended to ``completions.jsonl`` in the run's folder and, with W&B, to a table of the run. At the end of
    the run ``completions.parquet`` is written.

    Args:
        every_n_steps: Number of optimizer steps between two tables; the first step is always shown.
        rows: Number of completions per table, evenly spaced over the rollout.

    Raises:
        UsageError: An argument is below 1, or the module has no rollouts.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 4) -> None:
        if every_n_steps < 1 or rows < 1:
            raise UsageError(f"CompletionTable: every_n_steps is {every_n_steps} and rows is {rows}: give at least 1")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._last_step = 0
        self._file: Path | None = None
        # A wandb.Table. An annotation with the class would import wandb when options are parsed.
        self._table: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the module has rollouts."""
        if not hasattr(pl_module, "rollout"):
            raise UsageError(
                f"CompletionTable shows completions of a policy, but {type(pl_module).__name__} generates none: "
                "remove CompletionTable from trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the file, and starts a new table."""
        # Broadcast: all ranks must read it. None under fast_dev_run.
        folder = trainer.log_dir
        self._file = Path(folder) / "completions.jsonl" if folder else None
        self._last_step = trainer.global_step
        self._table = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows and saves completions of the rollout, if due."""
        step = trainer.global_step
        due = step == 1 or step % self.every_n_steps == 0
        if not due or step == self._last_step or not trainer.is_global_zero:
            return
        self._last_step = step
        module: Any = pl_module
        rows = completion_rows(module.rollout, module.preferences, step, self.rows)
        _print(trainer, render(rows, f"Completions at step {step}", ("reward", "advantage")))
        if self._file is not None:
            append_rows(self._file, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_to_wandb(logger, [flatten(row, module.preferences.names) for row in rows])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``completions.parquet``."""
        module: Any = pl_module
        if self._file is not None and self._file.exists() and trainer.is_global_zero:
            write_parquet(self._file, module.preferences.names)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes ``completions.parquet`` when the run is stopped."""
        self.on_train_end(trainer, pl_module)

    def _log_to_wandb(self, logger: WandbLogger, rows: list[Row]) -> None:
        """Adds rows to the same table in W&B, so that the dashboard shows the history."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*map(wandb_cell, row.values()))
        logger.experiment.log({"completions": self._table, "trainer/global_step": rows[0]["step"]})


def _print(trainer: Trainer, text: str) -> None:
    """Prints a text above the progress bar, if there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        bar.print(text)
    else:
        print(text)


STEP = "trainer/global_step"
"""Metric of the x-axis in W&B."""
RUN_FILE = "wandb_run.json"
"""File in the run's folder that holds the id of the W&B run."""


class MetricInfo(NamedTuple):
    """Description of a metric in W&B.

    Args:
        unit: Unit, or the quantity that is measured.
        summary: Aggregates in the summary of a run: ``last``, ``min``, ``max`` or ``mean``, separated by commas.
    """

    unit: str
    summary: str = "last"


METRICS = {
    "train/loss": MetricInfo("the policy optimizer's objective"),
    "train/reward*": MetricInfo(
        "reward of the mapping function, mean over completions of instructed prompts", "last,max"
    ),
    "train/proxy*": MetricInfo("the classifier's probability of the requested level", "last,max"),
    "train/gold*": MetricInfo("share of requests that the judge finds met", "last,max"),
    "train/kl": MetricInfo("nats per completion, to the reference", "last,max"),
    "train/kl_k3": MetricInfo("nats per token, to the reference", "last,max"),
    "train/entropy": MetricInfo("nats per token", "last,min"),
    "train/length": MetricInfo("tokens per completion", "last,mean"),
    "train/truncated": MetricInfo("share of completions cut at the length limit", "last,max"),
    "train/used": MetricInfo("share of completions that take part in updates", "last,min"),
    "train/clip_fraction": MetricInfo("share of completions or tokens whose ratio was clipped", "last,max"),
    "train/entropy_bonus": MetricInfo("nats per token, exact", "last,min"),
    "train/kl_loss": MetricInfo("nats, as in the loss", "last,max"),
    "train/kl_coef": MetricInfo("weight of the KL divergence"),
    "train/value_loss": MetricInfo("squared error of the critic, in squared rewards"),
    "train/value_clip_fraction": MetricInfo("share of tokens whose value was clipped", "last,max"),
    "train/pairs": MetricInfo("share of prompts with a chosen and a rejected completion", "last,min"),
    "train/accuracy": MetricInfo("share of comparisons whose chosen completion is the likelier one", "last,max"),
    "train/margin": MetricInfo("nats by which the chosen completion is likelier, times beta"),
    "train/multiplier*": MetricInfo("weight of the constrained dimension"),
    "train/off_policy/*": MetricInfo(
        "staleness in steps, kl in nats per token, weight, share of tokens whose weight is clipped", "last,max"
    ),
    "train/default_kl": MetricInfo("nats per token, on prompts without instruction", "last,max"),
    "train/hindsight_nll": MetricInfo("nats per token of relabelled completions", "last,min"),
    "train/rehearsal_kl": MetricInfo("nats per token, on the texts of rehearsal", "last,max"),
    "offset/*": MetricInfo("levels: achieved minus requested, by requested level"),
    "sampler/*": MetricInfo("probability that a prompt requests this; `dimensions`: maximal number per prompt"),
    "time/*": MetricInfo("seconds: of a step; sample, reward, old, reference, critic, hindsight: of a rollout", "mean"),
    "speed/tokens": MetricInfo("completion tokens per second and process", "mean"),
    "memory/*": MetricInfo("GiB", "max"),
    "guards/*": MetricInfo("number of trips of a guard", "max"),
    "val/*": MetricInfo("levels, or shares of completions", "last"),
    "steerability/*": MetricInfo("levels, or shares of completions", "last"),
}
"""Metrics by name; ``*`` stands for any suffix. See docs/dashboards.md for how to read them."""


class Dashboard(Callback):
    """Sets up W&B runs; the command line adds it to every run. It does nothing without W&B.

    All metrics get the training step as x-axis and a summary; their units are in the config of the W&B run under
    ``units``. The id of the W&B run is saved to ``wandb_run.json`` in the run's folder, for :func:`continue_run`.

    Args:
        artifacts: Whether to upload artifacts: after ``fit`` the best (or last) checkpoint and the saved completions,
            after ``test`` the report.
    """

    def __init__(self, artifacts: bool = False) -> None:
        self.artifacts = artifacts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Defines the metrics in W&B, and saves the id of the W&B run for ``fit``."""
        folder = trainer.log_dir  # broadcast: all processes must read it
        for logger in _wandb_loggers(trainer):
            run = logger.experiment
            for name, info in METRICS.items():
                run.define_metric(name, step_metric=STEP, summary=info.summary)
            run.config.update({"units": {name: info.unit for name, info in METRICS.items()}}, True)
            if stage == "fit" and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
                Path(folder).mkdir(parents=True, exist_ok=True)
                write_text(Path(folder) / RUN_FILE, json.dumps({"id": run.id}) + "\n")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Uploads checkpoint and completions."""
        checkpoint = best_checkpoint(trainer.checkpoint_callback)
        folder = trainer.log_dir
        completions = Path(folder or "") / "completions.parquet"
        self._upload(trainer, "checkpoint", [Path(checkpoint)] if checkpoint else [])
        self._upload(trainer, "completions", [completions] if completions.exists() else [])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Uploads the report."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        names = ("report.md", "steerability.json", "reward.json", "*.png")
        self._upload(trainer, "report", [path for name in names for path in sorted(folder.glob(name))])

    def _upload(self, trainer: Trainer, name: str, paths: list[Path]) -> None:
        """Uploads files and folders as an artifact of the W&B run, if ``artifacts`` is set."""
        loggers = _wandb_loggers(trainer)
        if not self.artifacts or not paths or not loggers:
            return
        import wandb

        for logger in loggers:
            artifact = wandb.Artifact(f"{name}-{logger.experiment.id}", type=name)
            for path in paths:
                artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)


def best_checkpoint(saver: Checkpoint | None) -> str:
    """Returns the path of the best checkpoint, or of the last one without ``monitor``; empty if there is none."""
    if not isinstance(saver, ModelCheckpoint):
        return ""
    if saver.monitor is None:  # best_model_path is then the checkpoint of the last interval
        return saver.last_model_path or saver.best_model_path
    return saver.best_model_path or saver.last_model_path


def continue_run(loggers: Iterable[Logger], checkpoint: Path) -> None:
    """Continues the W&B run of a checkpoint, unless the logger names a run.

    Args:
        loggers: ``trainer.loggers`` before their first use.
        checkpoint: Checkpoint to resume from; its run's folder holds the id of the W&B run.
    """
    folders = list(checkpoint.parents)  # file names with `/` make subfolders of `checkpoints`
    depth = next((i for i, folder in enumerate(folders) if folder.name == "checkpoints"), 0)
    run_files = [folder / RUN_FILE for folder in folders[: depth + 2] if (folder / RUN_FILE).exists()]
    for logger in loggers:
        if run_files and isinstance(logger, WandbLogger) and logger.version is None:
            set_wandb_run(logger, json.loads(run_files[0].read_text())["id"])


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Returns the W&B loggers in the main process, and none in other processes."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)] if trainer.is_global_zero else []
