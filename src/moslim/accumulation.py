"""Gradient accumulation: which batches make one optimizer step, and what their sums are divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from moslim.errors import UsageError
from moslim.processes import mean_over_processes
from moslim.training.lightning_compat import finished_batches


@runtime_checkable
class StepLoader(Protocol):
    """A loader that knows the rows of batches which are still to come."""

    def together(self, numbers: range) -> Any:
        """One batch of all rows that this process has in those batches of the current epoch."""


class StepCounts:
    """Denominators that make an optimizer step the mean over all that its batches hold, in all processes.

    Lightning divides the losses of a step by ``accumulate_grad_batches``, also in the last window of an epoch, which
    may have fewer batches, and takes the mean over processes. A batch's loss is therefore its sum, divided by what one
    batch of one process would hold if the step's rows were shared out evenly.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def __call__(self, trainer: Trainer, batch: Any, batch_idx: int, count: Callable[[Any], Tensor]) -> Tensor:
        """Returns what to divide the sums of a batch by, in the shape of the counts. Every process must ask.

        Args:
            trainer: The run's Trainer.
            batch: The training batch.
            batch_idx: Its number in the epoch.
            count: From a batch to what is counted in it, any shape; called with the batch, or with all of the step.

        Raises:
            UsageError: Gradients are accumulated over batches of a loader that does not know those still to come.
        """
        several = trainer.accumulate_grad_batches
        if several == 1:
            return mean_over_processes(count(batch))
        window = step_batches(trainer, batch_idx)
        if self._counts is None or batch_idx == window.start:
            loader = trainer.train_dataloader
            if not isinstance(loader, StepLoader):
                raise UsageError(
                    f"trainer.accumulate_grad_batches is {several}: a step is averaged over all rows of its batches, "
                    f"which a {type(loader).__name__} does not tell in advance: give the rows as a "
                    "PreferenceDataModule, or set accumulate_grad_batches to 1"
                )
            counts = count(loader.together(window)).to(trainer.strategy.root_device)
            self._counts = mean_over_processes(counts) / several
        return self._counts


def step_batches(trainer: Trainer, batch_idx: int) -> range:
    """Numbers of the epoch's batches whose gradients make one optimizer step, ``batch_idx`` among them."""
    several = trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % several
    return range(first, int(min(first + several, trainer.num_training_batches)))


def check_accumulation(trainer: Trainer) -> None:
    """Refuses a run whose first or last optimizer step of an epoch would learn from a part of its batches.

    Raises:
        UsageError: It would.
    """
    several = trainer.accumulate_grad_batches
    done = finished_batches(trainer)
    if within_accumulation(trainer):
        raise UsageError(
            f"the checkpoint was written after batch {done} of an epoch, within the {several} batches that "
            "trainer.accumulate_grad_batches makes a step of, and holds no half-summed gradients: resume from another "
            f"checkpoint, or with an accumulate_grad_batches that divides {done}"
        )
    if trainer.strategy.handles_gradient_accumulation and trainer.num_training_batches % several:
        raise UsageError(
            f"an epoch has {trainer.num_training_batches} batches, no multiple of trainer.accumulate_grad_batches = "
            f"{several}: DeepSpeed would make a step of the batches of two epochs; set trainer.limit_train_batches to "
            "a multiple of it"
        )


def within_accumulation(trainer: Trainer) -> bool:
    """Whether gradients of finished batches wait for their optimizer step. An epoch's last batch always makes one."""
    done = finished_batches(trainer)
    return done % trainer.accumulate_grad_batches > 0 and done < trainer.num_training_batches
