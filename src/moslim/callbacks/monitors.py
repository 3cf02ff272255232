"""Monitors of throughput, time and memory, a probe of style words, and checkpoints at optimizer steps."""

from __future__ import annotations

import csv
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from moslim.callbacks.guards import GuardError
from moslim.data.sources.workbench import Workbench
from moslim.ops.loading import transformer_part
from moslim.policy.policy_models import Role
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.policy.shared_backbone import Weights, describe, resident_weights
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.training.base_module import RunModule, Stopwatch
from moslim.training.lightning_compat import OpenModelCheckpoint, finished_batches, started_batches
from moslim.training.optim import within_accumulation
from moslim.utils.errors import UsageError
from moslim.utils.files import shown
from moslim.workbench.grammar import COARSE, QUESTIONS, Topic, ask, gold_levels

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Peak memory since the last reset: of tensors on a CUDA device, else of the whole process.

    A reset also resets torch's peak statistics of the device.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Starts a new measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._has_proc:
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # resets VmHWM

    def read(self) -> int | None:
        """Returns the peak in bytes; None on systems without ``/proc``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._has_proc:
            return None
        lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024

    @property
    def _has_proc(self) -> bool:
        return (_PROCESS / "clear_refs").exists()


GIB = 2**30


class ThroughputMonitor(Callback):
    """Logs time, memory and throughput every ``trainer.log_every_n_steps`` steps; the command line adds it.

    - ``time/step``, ``time/backward``, ``time/update`` (clipping, optimizer, schedule), in seconds,
    - ``memory/cpu``, and on a CUDA device ``memory/gpu`` and ``memory/gpu_peak``, in GiB,
    - for a policy, ``speed/tokens``: completion tokens of this process per second, over all steps on a rollout, also
      shown in the progress bar.
    """

    def __init__(self) -> None:
        self._step_watch: Stopwatch | None = None
        self._phase_watch: Stopwatch | None = None
        self._rollout_watch: Stopwatch | None = None
        self._speed: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards the measurements of an earlier run."""
        self._step_watch = self._phase_watch = self._rollout_watch = None
        self._speed = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the time of the step and, on a new rollout, that of the rollout."""
        self._step_watch = Stopwatch(pl_module.device)
        if batch_idx % _batch_repeats(pl_module) == 0:
            self._rollout_watch = self._step_watch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Starts the time of the backward pass."""
        self._phase_watch = Stopwatch(pl_module.device)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the time of the backward pass and starts that of the update."""
        if self._phase_watch is not None:
            self._phase_watch.lap("time/backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the metrics, if due."""
        rollout = getattr(pl_module, "rollout", None)
        if rollout is not None and (batch_idx + 1) % _batch_repeats(pl_module) == 0 and self._rollout_watch is not None:
            tokens, seconds = int(rollout.mask.sum()), self._rollout_watch.read()
            self._speed = {"speed/tokens": tokens / seconds}
            pl_module.log_dict(self._speed, prog_bar=True, logger=False, batch_size=1)
            self._rollout_watch = None  # a run that is resumed within a rollout has no start time of it
        if self._step_watch is None or self._phase_watch is None or not shown(trainer):
            return
        self._phase_watch.lap("time/update")
        metrics = {
            **self._phase_watch.durations,
            "time/step": self._step_watch.read(),
            **memory(pl_module.device),
            **self._speed,
        }
        if isinstance(pl_module, RunModule):
            pl_module.record(metrics)
        else:
            pl_module.log_dict(metrics, batch_size=1)


def memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, with CUDA, memory of tensors on the device, in GiB."""
    metrics = {"memory/cpu": resident_bytes() / GIB}
    if device.type == "cuda":
        metrics["memory/gpu"] = torch.cuda.memory_allocated(device) / GIB
        metrics["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    return metrics


def resident_bytes() -> int:
    """Resident memory of this process in bytes; its peak on systems other than Linux."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _batch_repeats(module: LightningModule) -> int:
    """Number of steps on a rollout; 1 for other modules."""
    return int(getattr(module, "batch_repeats", 1))


FILE = "role_memory.csv"
"""File in the run's folder."""


class RoleMemory(Callback):
    """Writes the memory of each role to ``role_memory.csv`` in the run's folder when a policy's ``fit`` starts.

    The command line adds it to every run. The file has a line per role (policy, reference, classifier, critic): number
    of ``parameters`` and of ``trained`` ones, bytes of its weights ``alone``, and bytes that it ``added`` to the roles
    in the lines above. After the first step the file also has the ``peak``: the largest number of bytes in use from a
    forward pass of the role to the next one of another role; the policy's includes backward pass and update. It is
    measured by :class:`PeakMemory`, which resets ``memory/gpu_peak`` for each role.
    """

    def __init__(self) -> None:
        self._weights: list[Weights] = []
        self._peaks: dict[Role, int | None] = {}
        self._handles: list[RemovableHandle] = []
        self._role: Role | None = None
        self._memory: PeakMemory | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the weights and starts the measurement of the first step."""
        if not isinstance(pl_module, PolicyTrainer):
            return
        self._weights, self._peaks, self._role = resident_weights(pl_module.models, pl_module.scorer), {}, None
        self._memory = PeakMemory(pl_module.device)
        rank_zero_info(describe(self._weights))
        self._write(trainer, pl_module)
        self._add_hooks(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the measurement after the first step and completes the file."""
        if self._handles and isinstance(pl_module, PolicyTrainer):
            self._begin(None)
            self._remove_hooks()
            self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the measurement."""
        self._remove_hooks()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the measurement if there was no step."""
        self._remove_hooks()

    def _add_hooks(self, module: PolicyTrainer) -> None:
        policy = transformer_part(module.models.policy)
        self._add_hook(policy, lambda: module.models.active)
        self._add_hook(module.scorer.classifier.backbone, lambda: "classifier")
        with module.models.reference() as model:
            if transformer_part(model) is not policy:
                self._add_hook(transformer_part(model), lambda: "reference")

    def _add_hook(self, model: Any, role: Callable[[], Role]) -> None:
        """Starts the measurement of a role at each forward pass of a model."""

        def begin(hooked: Any, *_: Any) -> None:
            if hooked is model:  # a copy has the hook too, and another thread may sample with it
                self._begin(role())

        self._handles.append(model.register_forward_pre_hook(begin))

    def _begin(self, role: Role | None) -> None:
        """Stores the peak of the current role and starts the measurement of the next one."""
        if self._memory is None or role == self._role:
            return
        if self._role is not None:
            self._peaks[self._role] = max(self._peaks.get(self._role) or 0, self._memory.read() or 0) or None
        self._memory.reset()
        self._role = role

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _write(self, trainer: Trainer, module: PolicyTrainer) -> None:
        path = module.run_folder / FILE
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(weights), "peak": self._peaks.get(weights.role)} for weights in self._weights]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


_PROBE_SEED = 7  # distinguishes the seeds from those of other completions


class StyleProbe(Callback):
    """Measures the effect of the embedded world's style words on the gold levels, at the end of ``fit``.

    Logs ``style/{dimension}``, the mean gold level with the high word minus that with the low word, for a
    :class:`~moslim.callbacks.Gate` that comes later in ``trainer.callbacks``. Held-out topics are not used.

    Args:
        questions: Number of questions per style word.
    """

    def __init__(self, questions: int = 96) -> None:
        self.questions = questions

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates completions and logs the metrics.

        Raises:
            UsageError: The module is not a SupervisedTrainer, or the data are not those of the embedded world.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SupervisedTrainer):
            raise UsageError(
                f"StyleProbe measures a SupervisedTrainer, not a {type(pl_module).__name__}: remove it from "
                "trainer.callbacks"
            )
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        if not isinstance(source, Workbench):
            raise UsageError(
                f"StyleProbe asks about the embedded world, but data.source is a {type(source).__name__}: remove it "
                "from trainer.callbacks"
            )
        topics, metrics = source.topics(held_out=False), {}
        for index, (dimension, words) in enumerate(COARSE.items()):
            low, high = (self._mean_level(pl_module, topics, dimension, word, index) for word in words)
            metrics[f"style/{dimension}"] = high - low
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _mean_level(
        self, module: SupervisedTrainer, topics: Sequence[Topic], dimension: str, word: str, index: int
    ) -> float:
        """Mean gold level of completions on evenly spaced topics, asked for with a style word."""
        selected = [topics[i * len(topics) // self.questions] for i in range(self.questions)]
        questions = [ask(topic, i % len(QUESTIONS), [word]) for i, topic in enumerate(selected)]
        seeds: list[tuple[int, ...]] = [(_PROBE_SEED, index, i) for i in range(len(questions))]
        completions = module.answers(list(questions), seeds, 1.0)
        levels = [
            gold_levels(question, completion)[dimension]
            for question, completion in zip(questions, completions, strict=True)
        ]
        return sum(levels) / len(levels)


class StepCheckpoint(OpenModelCheckpoint):
    """Lightning's ModelCheckpoint that saves at optimizer steps only; the command line adds it to every run.

    A checkpoint does not hold accumulated gradients. One that is due within ``trainer.accumulate_grad_batches`` is
    saved after the next optimizer step. With ``save_on_exception``, none is saved within an accumulation, while weights
    change, or after a guard stopped the run, since a resumed run would trip it again. With ``save_last``, ``last.ckpt``
    is updated at the end of training, where Lightning keeps that of the last interval.
    """

    _postponed = False
    _stepping = False

    def skips(self, trainer: Trainer) -> bool:
        """Whether a checkpoint that is due is not written now."""
        return super().skips(trainer) or within_accumulation(trainer)

    def saves_on_exception(self, trainer: Trainer) -> bool:
        """Whether an exception makes a checkpoint."""
        batch_in_progress = finished_batches(trainer) < started_batches(trainer)
        weights_change = self._stepping and batch_in_progress
        return super().saves_on_exception(trainer) and not within_accumulation(trainer) and not weights_change

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a checkpoint, unless a guard stopped the run."""
        if not isinstance(exception, GuardError):
            super().on_exception(trainer, pl_module, exception)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Records that weights may change in this batch."""
        self._stepping = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Records that no weights have changed in this batch."""
        self._stepping = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves a checkpoint, or postpones it within an accumulation."""
        self._postponed = within_accumulation(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves a checkpoint that is due or was postponed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._postponed and not within_accumulation(trainer):
            self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates ``last.ckpt``, except within an accumulation."""
        if within_accumulation(trainer):
            return
        self.forget_older(trainer)
        super().on_train_end(trainer, pl_module)
