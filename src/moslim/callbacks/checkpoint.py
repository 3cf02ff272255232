"""When checkpoints are written: between optimizer steps, never within the accumulation of one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moslim.accumulation import within_accumulation
from moslim.callbacks.guards import GuardError
from moslim.training.lightning_compat import OpenModelCheckpoint, finished_batches, started_batches


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
