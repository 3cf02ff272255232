"""Optimizers, learning-rate schedules and gradient accumulation, set up in one way for all modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from moslim.ops.numerics import at_least_float32
from moslim.training.distributed import any_process, mean_over_processes
from moslim.training.lightning_compat import attached_trainer, finished_batches
from moslim.utils.errors import UsageError


@runtime_checkable
class StepLoader(Protocol):
    """Loader that knows the rows of future batches."""

    def together(self, numbers: range) -> Any:
        """Returns all rows of this process in the given batches of the current epoch, as one batch."""


class StepCounts:
    """Denominators that make the loss of an optimizer step the mean over all its batches in all processes.

    Lightning divides the losses of a step by ``accumulate_grad_batches``, also in the last window of an epoch, which
    may have fewer batches, and takes the mean over processes. A batch's loss is therefore its sum, divided by what one
    batch of one process would hold if the step's rows were shared out evenly.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def __call__(self, trainer: Trainer, batch: Any, batch_idx: int, count: Callable[[Any], Tensor]) -> Tensor:
        """Returns the denominators of the sums of a batch, in the shape of the counts. Collective.

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
    """Returns the indices of the batches that are accumulated to one optimizer step with ``batch_idx``."""
    several = trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % several
    return range(first, int(min(first + several, trainer.num_training_batches)))


def check_accumulation(trainer: Trainer) -> None:
    """Refuses gradient accumulation in which an optimizer step would use only some of its batches.

    Raises:
        UsageError: The run resumes within an accumulation, or DeepSpeed would accumulate over two epochs.
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


_NEVER = 2**62
"""A frequency that no count of epochs reaches."""


@runtime_checkable
class FollowsRun(Protocol):
    """A schedule that depends on how long the run is."""

    def follow(self, run_length: Callable[[], float]) -> None:
        """Takes a function that returns the number of optimizer steps of the whole run.

        It may be called once training has begun, not before: to know the length, the Trainer must load the
        training data, and if that happens too early a resumed loader loses its position.
        """


class WarmupDecay(LRScheduler):
    """Linear warm-up, then decay until the end of the run, whose length the Trainer provides.

    Args:
        optimizer: The optimizer.
        warmup_steps: Steps before the full rate; the first of them takes ``1 / (warmup_steps + 1)`` of it.
        final: Fraction of the full rate that is reached at the end of the run.
        power: 1 falls linearly; what is above ``final`` falls as this power of the part of the run that is left, so
            that below 1 the rate stays high for longer.

    Raises:
        UsageError: ``power`` is not above 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, final: float = 0.0, power: float = 1.0) -> None:
        if power <= 0:
            raise UsageError(f"power is {power}: give a number above 0; 1 falls linearly")
        self.warmup_steps = warmup_steps
        self.final = final
        self.power = power
        self._run_length: Callable[[], float] | None = None
        super().__init__(optimizer)

    def follow(self, run_length: Callable[[], float]) -> None:
        """See :class:`FollowsRun`."""
        self._run_length = run_length

    def get_lr(self) -> list[float | Any]:
        """Returns the rates of the current step, a function of its number alone."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state without the length of the run, since a resumed run may be longer."""
        return {key: value for key, value in super().state_dict().items() if key != "_run_length"}

    def _factor(self, step: int) -> float:
        if step <= self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self._run_length is None:
            raise RuntimeError("WarmupDecay does not know the length of the run: call follow() with a function for it")
        end = self._run_length()
        if not math.isfinite(end):
            raise UsageError("WarmupDecay needs a run that ends: set trainer.max_steps or trainer.max_epochs")
        done = min(1.0, (step - self.warmup_steps) / max(1.0, end - self.warmup_steps))
        return self.final + (1.0 - self.final) * (1.0 - done) ** self.power


@dataclass
class RateGroup:
    """Parameters with their own learning rate.

    Args:
        parameters: The parameters.
        lr: Their rate; None = the larger of ``least`` and the rate of the other parameters.
        least: Minimum of the rate if ``lr`` is None.
    """

    parameters: Sequence[nn.Parameter]
    lr: float | None = None
    least: float = 0.0


def configure(
    module: LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    parameters: Iterable[nn.Parameter],
    default_lr: float = 1e-5,
    apart: RateGroup | None = None,
) -> OptimizerConfig | OptimizerLRSchedulerConfig:
    """Returns the result of ``configure_optimizers``: an optimizer, and a schedule that steps with it.

    A ``ReduceLROnPlateau`` steps after each validation instead, see :class:`PlateauSteps`.

    Args:
        module: The module; its Trainer knows how long the run is.
        optimizer: From parameters to optimizer; None = AdamW without weight decay.
        lr_scheduler: From optimizer to schedule; None = a constant rate.
        parameters: What is trained; parameters without gradient are left out.
        default_lr: Rate of the default optimizer.
        apart: Which of them make a parameter group of their own, whose schedule and other options are the same; None =
            none.

    Raises:
        UsageError: Trained weights are held in bfloat16 or float16, or float16 is trained without loss scaling.
        UsageError: A ``ReduceLROnPlateau`` does not say which metric it watches.
    """
    if attached_trainer(module) is not None:
        check_precision(module)
    trained = [p for p in parameters if p.requires_grad]
    apart_ids = {id(p) for p in apart.parameters} if apart else set()
    first_group = [p for p in trained if id(p) not in apart_ids]
    second_group = [p for p in trained if id(p) in apart_ids]
    built = optimizer(first_group) if optimizer else AdamW(first_group, lr=default_lr, weight_decay=0.0)
    if apart is not None:
        rate = max(apart.least, *(float(group["lr"]) for group in built.param_groups)) if apart.lr is None else apart.lr
        built.add_param_group({"params": second_group, "lr": rate})
    if lr_scheduler is None:
        return {"optimizer": built}
    schedule = lr_scheduler(built)
    if isinstance(schedule, FollowsRun):
        schedule.follow(lambda: module.trainer.estimated_stepping_batches)
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = getattr(schedule, "monitor", None)
        if monitor is None:
            raise UsageError(
                "model.lr_scheduler: torch's ReduceLROnPlateau does not say which metric it watches: take class_path "
                "lightning.pytorch.cli.ReduceLROnPlateau with init_args.monitor, e.g. val/loss"
            )
        by_callback = {"scheduler": schedule, "monitor": monitor, "strict": False, "frequency": _NEVER}
        return {"optimizer": built, "lr_scheduler": cast("LRSchedulerConfigType", by_callback)}
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_precision(module: LightningModule) -> None:
    """Refuses to train weights whose precision is too low for the steps of an optimizer.

    A bfloat16 number has 8 significant bits: a step of less than about 1/512 of a weight is rounded away. In five steps
    of AdamW at 1e-6, 445 of a small policy's 28,576 weights changed in bfloat16, 27,288 in float32. In float16,
    gradients vanish or overflow where the loss is not scaled.

    Raises:
        UsageError: Trained weights are held in bfloat16 or float16, or float16 is trained without loss scaling.
    """
    precision = module.trainer.precision
    trained = {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}
    coarse = {name: dtype for name, dtype in trained.items() if dtype != at_least_float32(dtype)}
    if coarse:
        name, dtype = next(iter(coarse.items()))
        dtype_name = str(dtype).removeprefix("torch.")
        mixed = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
        remedy = f"set trainer.precision to {mixed}"
        if "dtype" in module.hparams:  # the module has this option
            remedy += (
                " and leave model.dtype at float32; or train a low-rank adapter (model.lora), whose weights are "
                "float32 on a frozen model, with model.dtype bfloat16 and trainer.precision 32-true"
            )
        raise UsageError(
            f"{len(coarse)} of {len(trained)} trained weights are held in {dtype_name} (such as {name}; "
            f"trainer.precision is '{precision}'), in which small steps are rounded away. To compute in {dtype_name} "
            f"with weights in float32, {remedy}"
        )
    narrow = [name for name, p in module.named_parameters() if p.dtype == torch.float16]
    if narrow and getattr(module.trainer.precision_plugin, "scaler", None) is None:
        raise UsageError(
            f"weights are held in float16 (such as {narrow[0]}) and the loss is not scaled (trainer.precision is "
            f"'{precision}'), so that gradients vanish or overflow: set model.dtype to bfloat16, or trainer.precision "
            "to 16-mixed, which scales the loss on a GPU"
        )


def nonfinite_weights(parameters: Sequence[tuple[str, Tensor]]) -> str | None:
    """Returns a message on the first weight (or local shard) with NaN or infinity; None if all are finite."""
    for name, weight in parameters:
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        if not bool(torch.isfinite(local).all()):
            return f"weight {name} is not finite"
    return None


class FiniteWeights(Callback):
    """Raises an error at the end of a run with nonfinite weights, before they are exported or replace ``last.ckpt``."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks all trained weights, unless another callback handles nonfinite values (``sees_nonfinite``).

        Raises:
            UsageError: A weight is not finite.
        """
        if any(getattr(callback, "sees_nonfinite", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        reason = nonfinite_weights([(name, p.detach()) for name, p in pl_module.named_parameters() if p.requires_grad])
        if any_process(reason is not None, pl_module.device):
            raise UsageError(
                f"training ended at step {trainer.global_step} with weights that are not finite, which are not saved: "
                f"{reason or 'a weight of another process is not finite'}. Go on from an earlier checkpoint with a "
                "lower learning rate, or with trainer.gradient_clip_val"
            )


class PlateauSteps(Callback):
    """Steps a ``ReduceLROnPlateau`` after each validation or, in a run without validation, after each epoch.

    Lightning would step it at the end of epochs only, and not at all in a run that is shorter than one epoch.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedule before a checkpoint is written, which then contains its state."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._move(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedule in a run without validation."""
        if not sum(trainer.num_val_batches):
            self._move(trainer)

    def _move(self, trainer: Trainer) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                assert config.monitor is not None
                value = trainer.callback_metrics.get(config.monitor)
                if value is None:
                    known = ", ".join(sorted(trainer.callback_metrics)) or "none"
                    raise UsageError(
                        f"model.lr_scheduler watches monitor = '{config.monitor}', which was not measured; "
                        f"metrics at this point: {known}"
                    )
                config.scheduler.step(trainer.strategy.broadcast(float(value)))
