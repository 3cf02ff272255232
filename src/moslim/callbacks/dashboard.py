"""W&B: axes and units of the metrics, one run for a training that is resumed, artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger

from moslim.training.lightning_compat import set_wandb_run
from moslim.utils.files import write_text

STEP = "trainer/global_step"
RUN_FILE = "wandb_run.json"


class Meaning(NamedTuple):
    """What a metric is measured in, and what of it a run's summary shows (``last``, ``min``, ``max``, ``mean``)."""

    unit: str
    summary: str = "last"


METRICS = {
    "train/loss": Meaning("the policy optimizer's objective"),
    "train/reward*": Meaning("reward of the mapping function, mean over answers to instructed prompts", "last,max"),
    "train/proxy*": Meaning("the classifier's probability of the requested level", "last,max"),
    "train/gold*": Meaning("share of requests that the judge finds met", "last,max"),
    "train/kl": Meaning("nats per answer, to the reference", "last,max"),
    "train/kl_k3": Meaning("nats per token, to the reference", "last,max"),
    "train/entropy": Meaning("nats per token", "last,min"),
    "train/length": Meaning("tokens per answer", "last,mean"),
    "train/truncated": Meaning("share of answers cut at the length limit", "last,max"),
    "train/used": Meaning("share of answers that take part in updates", "last,min"),
    "train/clip_fraction": Meaning("share of answers or tokens whose ratio was clipped", "last,max"),
    "train/entropy_bonus": Meaning("nats per token, exact", "last,min"),
    "train/kl_loss": Meaning("nats, as the loss holds it", "last,max"),
    "train/kl_coef": Meaning("weight of the KL divergence"),
    "train/value_loss": Meaning("squared reward, of the critic"),
    "train/value_clip_fraction": Meaning("share of tokens whose value was clipped", "last,max"),
    "train/pairs": Meaning("share of prompts with a pair of answers to compare", "last,min"),
    "train/accuracy": Meaning("share of pairs whose chosen answer is the likelier one", "last,max"),
    "train/margin": Meaning("nats by which it is, times beta"),
    "train/multiplier*": Meaning("weight of the dimension that is held"),
    "train/off_policy/*": Meaning(
        "staleness in steps, kl in nats per token, weight, share of tokens capped", "last,max"
    ),
    "train/default_kl": Meaning("nats per token, on prompts without instruction", "last,max"),
    "offset/*": Meaning("levels: achieved less requested, by requested level"),
    "sampler/*": Meaning("probability that a prompt asks for this; `dimensions`: the most that one may name"),
    "time/*": Meaning("seconds: of a step; sample, reward, old, reference and critic: of a rollout", "mean"),
    "speed/tokens": Meaning("new answer tokens per second and process", "mean"),
    "memory/*": Meaning("GiB", "max"),
    "guards/*": Meaning("times that a guard tripped", "max"),
    "val/*": Meaning("levels, or shares of answers", "last"),
    "steerability/*": Meaning("levels, or shares of answers", "last"),
}
"""By name, or by its beginning and ``*``. docs/dashboards.md lists them with what to look for."""


class Dashboard(Callback):
    """Prepares a W&B run so that its charts can be read; the command line adds it to every run.

    All metrics get the training step as x-axis, and a summary; their units are in the run's config under ``units``.
    The run's id goes to ``wandb_run.json`` in the run's folder, where :func:`continue_run` finds it. Without W&B
    nothing happens.

    Args:
        artifacts: Also store in W&B: after ``fit`` the best checkpoint, or the last one, and the answers that were
            kept; after ``test`` the report.
    """

    def __init__(self, artifacts: bool = False) -> None:
        self.artifacts = artifacts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # every process must ask
        for logger in _boards(trainer):
            run = logger.experiment
            for name, meaning in METRICS.items():
                run.define_metric(name, step_metric=STEP, summary=meaning.summary)
            run.config.update({"units": {name: meaning.unit for name, meaning in METRICS.items()}}, True)
            if stage == "fit" and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
                Path(folder).mkdir(parents=True, exist_ok=True)
                write_text(Path(folder) / RUN_FILE, json.dumps({"id": run.id}) + "\n")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = best_checkpoint(trainer.checkpoint_callback)
        folder = trainer.log_dir
        answers = Path(folder or "") / "completions.parquet"
        self._store(trainer, "checkpoint", [Path(checkpoint)] if checkpoint else [])
        self._store(trainer, "completions", [answers] if answers.exists() else [])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        names = ("report.md", "steerability.json", "reward.json", "*.png")
        self._store(trainer, "report", [path for name in names for path in sorted(folder.glob(name))])

    def _store(self, trainer: Trainer, kind: str, paths: list[Path]) -> None:
        boards = _boards(trainer)
        if not self.artifacts or not paths or not boards:
            return
        import wandb

        for logger in boards:
            artifact = wandb.Artifact(f"{kind}-{logger.experiment.id}", type=kind)
            for path in paths:
                artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)


def best_checkpoint(saver: Checkpoint | None) -> str:
    """Path of the checkpoint that ``monitor`` calls the best, without one of the last; empty where there is none."""
    if not isinstance(saver, ModelCheckpoint):
        return ""
    if saver.monitor is None:  # Lightning calls the one of the last interval the best
        return saver.last_model_path or saver.best_model_path
    return saver.best_model_path or saver.last_model_path


def continue_run(loggers: Iterable[Logger], checkpoint: Path) -> None:
    """Lets a resumed training go on in the W&B run that it began in, unless the logger names another one.

    Args:
        loggers: ``trainer.loggers``, before the Trainer has used them.
        checkpoint: What is resumed from; the run's id lies in its run's folder.
    """
    folders = list(checkpoint.parents)  # a name with `/` in it lies deeper than in `checkpoints`
    depth = next((i for i, folder in enumerate(folders) if folder.name == "checkpoints"), 0)
    places = [folder / RUN_FILE for folder in folders[: depth + 2] if (folder / RUN_FILE).exists()]
    for logger in loggers:
        if places and isinstance(logger, WandbLogger) and logger.version is None:
            set_wandb_run(logger, json.loads(places[0].read_text())["id"])


def _boards(trainer: Trainer) -> list[WandbLogger]:
    """The W&B loggers, in the process that may use them."""
    return [one for one in trainer.loggers if isinstance(one, WandbLogger)] if trainer.is_global_zero else []
