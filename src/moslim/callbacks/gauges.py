"""How fast a run is, where its time goes, and what memory it holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moslim.base import RunModule
from moslim.reporting import shown
from moslim.timing import Stopwatch

GIB = 2**30


class Gauges(Callback):
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
        gauges = {**self._phase.laps, "time/step": self._step.read(), **memory(pl_module.device), **self._speed}
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
