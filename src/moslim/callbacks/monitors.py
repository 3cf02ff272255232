"""Monitors of throughput, time and memory.

The most memory that was in use for a while.

How fast a run is, where its time goes, and what memory it holds.

Which role of a policy's training holds how much memory.

Does a starter follow the loose style words in questions? Measured on the embedded world.
"""

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
    """Largest memory in use since the last reset: of tensors on a CUDA device, else of the whole process.

    Resetting sets torch's own peak statistics of the device back, too.

    Args:
        device: The device that is used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begins anew."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._known:
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the kernel's way to say so

    def read(self) -> int | None:
        """Bytes; None on systems that do not tell (those without ``/proc``)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024

    @property
    def _known(self) -> bool:
        return (_PROCESS / "clear_refs").exists()


GIB = 2**30


class ThroughputMonitor(Callback):
    """Logs, at every ``trainer.log_every_n_steps``:

    - ``time/step``, ``time/backward``, ``time/update`` (clipping, optimizer, schedule), in seconds,
    - ``memory/cpu``, and on a CUDA device ``memory/gpu`` and ``memory/gpu_peak``, in GiB,
    - for a policy, ``speed/tokens``: new answer tokens per second over all steps on a rollout, of this process; the
      progress bar shows it too.

    The command line adds it to every run.
    """

    def __init__(self) -> None:
        self._step: Stopwatch | None = None
        self._phase: Stopwatch | None = None
        self._cycle: Stopwatch | None = None
        self._speed: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._phase = self._cycle = None
        self._speed = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = Stopwatch(pl_module.device)
        if batch_idx % _repeats(pl_module) == 0:
            self._cycle = self._step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._phase = Stopwatch(pl_module.device)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._phase is not None:
            self._phase.lap("time/backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rollout = getattr(pl_module, "rollout", None)
        if rollout is not None and (batch_idx + 1) % _repeats(pl_module) == 0 and self._cycle is not None:
            tokens, seconds = int(rollout.mask.sum()), self._cycle.read()
            self._speed = {"speed/tokens": tokens / seconds}
            pl_module.log_dict(self._speed, prog_bar=True, logger=False, batch_size=1)
            self._cycle = None  # in a run resumed within a rollout, its first one has no beginning
        if self._step is None or self._phase is None or not shown(trainer):
            return
        self._phase.lap("time/update")
        gauges = {**self._phase.durations, "time/step": self._step.read(), **memory(pl_module.device), **self._speed}
        if isinstance(pl_module, RunModule):
            pl_module.record(gauges)
        else:
            pl_module.log_dict(gauges, batch_size=1)


def memory(device: torch.device) -> dict[str, float]:
    """GiB held by this process on the host (resident) and, where it uses CUDA, by tensors on the device."""
    found = {"memory/cpu": resident_bytes() / GIB}
    if device.type == "cuda":
        found["memory/gpu"] = torch.cuda.memory_allocated(device) / GIB
        found["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    return found


def resident_bytes() -> int:
    """Resident memory of this process; where only its peak is known (not on Linux), the peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _repeats(module: LightningModule) -> int:
    return int(getattr(module, "batch_repeats", 1))


FILE = "role_memory.csv"


class RoleMemory(Callback):
    """Writes ``role_memory.csv`` into the run's folder when a policy's ``fit`` starts, and logs its gist in a line.

    One line per role (policy, reference, classifier, critic): ``parameters`` that it reads, ``trained`` ones, bytes of
    weights that it would hold ``alone``, and those that it has ``added`` to the roles above it. After the first step
    the file also has the ``peak``: the most bytes in use, by all, from a pass of the role to the next one of another;
    backward pass and update count for the policy. On a CUDA device these are tensors on it, else the whole process;
    and ``memory/gpu_peak`` begins anew with each of them.

    The command line adds it to every run.
    """

    def __init__(self) -> None:
        self._weights: list[Weights] = []
        self._peaks: dict[Role, int | None] = {}
        self._handles: list[RemovableHandle] = []
        self._role: Role | None = None
        self._memory: PeakMemory | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the weights, and watches the first step."""
        if not isinstance(pl_module, PolicyTrainer):
            return
        self._weights, self._peaks, self._role = resident_weights(pl_module.models, pl_module.scorer), {}, None
        self._memory = PeakMemory(pl_module.device)
        rank_zero_info(describe(self._weights))
        self._write(trainer, pl_module)
        self._watch(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the watch after the first step, and completes the file."""
        if self._handles and isinstance(pl_module, PolicyTrainer):
            self._begin(None)
            self._leave()
            self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the watch."""
        self._leave()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the watch, where there was no step."""
        self._leave()

    def _watch(self, module: PolicyTrainer) -> None:
        policy = transformer_part(module.models.policy)
        self._on_pass(policy, lambda: module.models.active)
        self._on_pass(module.scorer.classifier.backbone, lambda: "classifier")
        with module.models.reference() as model:
            if transformer_part(model) is not policy:
                self._on_pass(transformer_part(model), lambda: "reference")

    def _on_pass(self, model: Any, role: Callable[[], Role]) -> None:
        def begin(passing: Any, *_: Any) -> None:
            if passing is model:  # and not a copy, which has its hooks, too: another thread may sample with one
                self._begin(role())

        self._handles.append(model.register_forward_pre_hook(begin))

    def _begin(self, role: Role | None) -> None:
        """Notes the peak of the role that made passes until now."""
        if self._memory is None or role == self._role:
            return
        if self._role is not None:
            self._peaks[self._role] = max(self._peaks.get(self._role) or 0, self._memory.read() or 0) or None
        self._memory.reset()
        self._role = role

    def _leave(self) -> None:
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


_PROBE = 7  # sets these answers apart from others with the same seed


class StyleProbe(Callback):
    """At the end of fit, measures how far each pair of style words moves its dimension's gold level.

    Logs ``style/{dimension}``: mean gold level with the high word less that with the low word, for a
    :class:`~moslim.callbacks.Gate` to compare. Held-out topics are not asked about. List it before the gate.

    Args:
        questions: Questions per style word.
    """

    def __init__(self, questions: int = 96) -> None:
        self.questions = questions

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Lightning.

        Raises:
            UsageError: The module is no SupervisedTrainer, or its data are not the embedded world's.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SupervisedTrainer):
            raise UsageError(f"StyleProbe measures a SupervisedTrainer, not a {type(pl_module).__name__}")
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        if not isinstance(source, Workbench):
            raise UsageError(f"StyleProbe asks about the embedded world, but data.source is a {type(source).__name__}")
        topics, found = source.topics(held_out=False), {}
        for number, (dimension, words) in enumerate(COARSE.items()):
            low, high = (self._mean_level(pl_module, topics, dimension, word, number) for word in words)
            found[f"style/{dimension}"] = high - low
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)

    def _mean_level(
        self, module: SupervisedTrainer, topics: Sequence[Topic], dimension: str, word: str, number: int
    ) -> float:
        asked = [topics[i * len(topics) // self.questions] for i in range(self.questions)]
        questions = [ask(topic, i % len(QUESTIONS), [word]) for i, topic in enumerate(asked)]
        keys: list[tuple[int, ...]] = [(_PROBE, number, i) for i in range(len(questions))]
        texts = module.answers(list(questions), keys, 1.0)
        return sum(gold_levels(q, a)[dimension] for q, a in zip(questions, texts, strict=True)) / len(texts)


class StepCheckpoint(OpenModelCheckpoint):
    """Lightning's, with the same options; the command line adds it to every run.

    A checkpoint does not hold half-summed gradients. So one that is due within ``trainer.accumulate_grad_batches`` is
    written after the optimizer step that follows. With ``save_on_exception``, none is written where an exception comes
    in between or while weights change, nor of what a guard has stopped, which would trip it again.

    With ``save_last``, ``last.ckpt`` is the end of a training that comes to its end. Lightning leaves it as it was at
    the last interval.
    """

    _postponed = False
    _stepping = False

    def skips(self, trainer: Trainer) -> bool:
        return super().skips(trainer) or within_accumulation(trainer)

    def saves_on_exception(self, trainer: Trainer) -> bool:
        changing = self._stepping and finished_batches(trainer) < started_batches(trainer)  # by a batch not counted yet
        return super().saves_on_exception(trainer) and not within_accumulation(trainer) and not changing

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, GuardError):
            super().on_exception(trainer, pl_module, exception)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._stepping = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stepping = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._postponed = within_accumulation(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._postponed and not within_accumulation(trainer):
            self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if within_accumulation(trainer):
            return
        self.forget_older(trainer)
        super().on_train_end(trainer, pl_module)
