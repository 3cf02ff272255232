"""Checks of a run: guards that stop or warn at a bad step, its replay, and gates that a stage must pass.

The functions that check a rollout return a description of the fault, or None.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from moslim.algorithms.functional import k1
from moslim.callbacks.dashboards import Row, completion_rows
from moslim.ops.numerics import nonfinite
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.training.checkpoint_files import GUARD_RECORD
from moslim.training.distributed import gathered, mean_over_processes
from moslim.training.optim import nonfinite_weights
from moslim.utils.errors import UsageError
from moslim.utils.files import console_table


def kl_fault(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, limit: float) -> str | None:
    """Checks that the estimated KL divergence to the reference, averaged over all processes, is within a limit.

    This is a collective call. The processes whose divergence is not below the mean return the fault.

    Args:
        logprobs: ``[N, T]`` log-probabilities of the policy that sampled the completions.
        ref_logprobs: ``[N, T]``; None without a reference.
        mask: ``[N, T]`` bool, completion tokens.
        limit: Nats per completion.
    """
    if ref_logprobs is None:
        return None
    local_kl = (k1(logprobs, ref_logprobs) * mask).sum(dim=1).mean()
    kl = mean_over_processes(local_kl)
    if kl <= limit or local_kl < kl:  # false if either is NaN
        return None
    return f"the KL divergence to the reference is {float(kl):.4g} nats per completion, not within {limit:g}"


def log_ratio_fault(
    source: str, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, tolerance: float, completions: bool = False
) -> str | None:
    """Checks that probability ratios are 1 while the policy has not changed since it sampled.

    Args:
        source: Origin of ``old_logprobs``, for the description.
        logprobs: ``[N, T]`` of the update's forward pass.
        old_logprobs: ``[N, T]``.
        mask: ``[N, T]`` bool, completion tokens to compare; may be empty.
        tolerance: Largest accepted mean of ``|log ratio|``; rounding in bfloat16 gives some hundredths per token.
        completions: Whether to compare ratios of whole completions, the products of those of their tokens.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    if completions:
        log_ratio, mask = log_ratio.sum(dim=1), mask.any(dim=1)
    mean = float((log_ratio.abs() * mask).sum() / mask.sum().clamp(min=1))
    if mean <= tolerance:
        return None
    return (
        f"update and {source} disagree before the first step on a rollout: mean |log ratio| over "
        f"{'completions' if completions else 'tokens'} is {mean:.4g}, above {tolerance:g}"
    )


def identical_fault(completions: Sequence[str], num_generations: int) -> str | None:
    """Checks that at least one prompt has different completions, whose rewards can be compared.

    Args:
        completions: ``B * n`` texts, those of one prompt adjacent.
        num_generations: Completions per prompt, ``n``; the check passes for 1.
    """
    groups = [completions[i : i + num_generations] for i in range(0, len(completions), num_generations)]
    if num_generations < 2 or any(len(set(group)) > 1 for group in groups):
        return None
    return f"the {num_generations} completions of every prompt are the same, such as {completions[0][:80]!r}"


def truncated_fault(ended: Tensor) -> str | None:
    """Checks that at least one completion of a rollout ended before the length limit, given ``ended``, ``[N]`` bool."""
    return None if bool(ended.any()) else f"all {len(ended)} completions were cut at the length limit"


class GateError(RuntimeError):
    """Failure of a :class:`Gate`."""


class Gate(Callback):
    """Fails a stage whose logged metrics miss thresholds, at the end of ``fit`` and of ``validate``.

    It does nothing under ``fast_dev_run``, in the sanity check, and when a run was interrupted.

    Args:
        minimum: Smallest accepted value by name of the metric.
        maximum: Largest accepted value by name of the metric.

    Raises:
        UsageError: There is no threshold.
        GateError: At the end of the stage: a metric is missing or not within its threshold.
    """

    def __init__(self, minimum: dict[str, float], maximum: dict[str, float] | None = None) -> None:
        self.minimum = minimum
        self.maximum = maximum or {}
        if not self.minimum and not self.maximum:
            raise UsageError("Gate: give at least one threshold in `minimum` or `maximum`")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the metrics after the last checkpoint is written."""
        self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the metrics of ``validate``; those of validation within ``fit`` may still improve."""
        if trainer.state.fn == "validate":
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]  # set dynamically
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        thresholds = [(name, ">=", smallest) for name, smallest in self.minimum.items()]
        thresholds += [(name, "<=", largest) for name, largest in self.maximum.items()]
        faults = [fault for name, sign, bound in thresholds if (fault := _threshold_fault(metrics, name, sign, bound))]
        if faults:
            reasons = "\n  ".join(faults)
            raise GateError(f"the gate failed; results of earlier runs are unchanged:\n  {reasons}")
        _print_passed(metrics, thresholds)


def _threshold_fault(metrics: dict[str, float], name: str, sign: str, bound: float) -> str | None:
    """Describes a metric that is missing or not within its threshold; None if it is within."""
    if name not in metrics:
        candidates = difflib.get_close_matches(name, metrics) or sorted(metrics)
        if not candidates:
            return f"{name}: no metrics were logged"
        return f"{name}: no such metric; did you mean {', '.join(candidates)}?"
    value = metrics[name]
    passed = value >= bound if sign == ">=" else value <= bound  # both false for NaN
    return None if passed else f"{name}: {value:.4g}, required {sign} {bound:g}"


@rank_zero_only
def _print_passed(metrics: dict[str, float], thresholds: list[tuple[str, str, float]]) -> None:
    rows = [[name, f"{metrics[name]:.4g}", f"{sign} {bound:g}"] for name, sign, bound in thresholds]
    print(console_table("gate passed", ["metric", "value", "threshold"], {"": rows}))


Action = Literal["stop", "warn", "off"]


class GuardError(RuntimeError):
    """Stop of a run by a guard."""


class Guards(Callback):
    """Checks every rollout and loss before the weights change; docs/troubleshooting.md lists the remedies.

    With the action ``stop`` a guard raises :class:`GuardError` in all processes before the step, so that weights and
    checkpoints stay unchanged. The step (rollout, weights and states) is saved to ``guards/<guard>-step<n>.ckpt`` in
    the run's folder; ``python main.py replay --ckpt_path`` shows its completions. With ``warn`` a guard warns and saves
    the step the first time that it trips. All trips are counted as ``guards/<guard>``.

    Args:
        nonfinite: Action for NaN or infinity in a rollout (log-probabilities of policy and reference, the classifier's
            probabilities, rewards, the critic's values, advantages), in the loss, or in a weight when a checkpoint is
            written.
        kl: Action for a KL divergence to the reference above ``kl_limit``; needs a ``kl_coef`` above 0.
        log_ratio: Action for probability ratios that are not 1 before the first step on a rollout: of the update to the
            engine, or to the old log-probabilities that later steps are clipped by. The ratios are those of tokens, or
            for old log-probabilities of whole completions if the optimizer clips these.
        identical: Action for a rollout in which all completions of each prompt are equal.
        truncated: Action for a rollout whose completions were all cut at the length limit.
        kl_limit: Limit in nats per completion, like the metric ``train/kl``.
        ratio_tolerance: Largest accepted mean of ``|log ratio|``; bfloat16 needs some hundredths.
        keep: Whether to save the step.

    Raises:
        UsageError: An action is unknown, or a limit is not above 0.
    """

    sees_nonfinite = True
    """The module leaves checks of finite values to this callback."""

    def __init__(
        self,
        nonfinite: Action = "stop",
        kl: Action = "stop",
        log_ratio: Action = "warn",
        identical: Action = "stop",
        truncated: Action = "warn",
        kl_limit: float = 100.0,
        ratio_tolerance: float = 0.05,
        keep: bool = True,
    ) -> None:
        self.actions: dict[str, Action] = {
            "nonfinite": nonfinite,
            "kl": kl,
            "log_ratio": log_ratio,
            "identical": identical,
            "truncated": truncated,
        }
        for name, action in self.actions.items():
            if action not in ("stop", "warn", "off"):
                raise UsageError(f"guards.{name} is '{action}': give 'stop', 'warn' or 'off'")
        if min(kl_limit, ratio_tolerance) <= 0:
            raise UsageError(
                f"guards.kl_limit is {kl_limit} and guards.ratio_tolerance is {ratio_tolerance}: give values above 0"
            )
        self.kl_limit = kl_limit
        self.ratio_tolerance = ratio_tolerance
        self.keep = keep
        self.trips: dict[str, int] = {}
        self._batch_idx = 0
        self._record: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resets the counts.

        Raises:
            UsageError: The module is not a PolicyTrainer.
        """
        if not isinstance(pl_module, PolicyTrainer):
            raise UsageError(
                f"Guards check a PolicyTrainer, not a {type(pl_module).__name__}: remove Guards from trainer.callbacks"
            )
        self.trips.clear()  # the trips in a checkpoint are loaded later

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of trips of each guard."""
        return {"trips": dict(self.trips)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the numbers of trips."""
        self.trips = dict(state_dict["trips"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Records the number of the batch."""
        self._batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss and, on its first use, the rollout.

        Raises:
            GuardError: A guard with the action ``stop`` has tripped.
        """
        module: Any = pl_module
        rollout, rows = module.rollout, module.rows
        checks: dict[str, Callable[[], str | None]] = {}
        if self._batch_idx % module.batch_repeats == 0:
            ref_logprobs = rollout.ref_logprobs
            update_mask = rows.update_mask  # other tokens have no log-probabilities
            checks = {
                "nonfinite": rollout.nonfinite,
                "kl": lambda: kl_fault(rollout.old_logprobs, ref_logprobs, rollout.mask, self.kl_limit),
                "log_ratio": lambda: self._log_ratio_fault(module, update_mask),
                "identical": lambda: identical_fault(rollout.completion_texts, module.num_generations),
                "truncated": lambda: truncated_fault(rollout.ended),
            }
        for guard, check in checks.items():
            self._check(trainer, module, guard, check)
        self._check(trainer, module, "nonfinite", lambda: nonfinite("the loss", loss.detach()))

    def _log_ratio_fault(self, module: Any, mask: Tensor) -> str | None:
        rows, logprobs, tolerance = module.rows, module.logprobs, self.ratio_tolerance
        engine_logprobs = rows.old_logprobs if rows.engine_logprobs is None else rows.engine_logprobs
        fault = log_ratio_fault("engine", logprobs, engine_logprobs, mask, tolerance)
        if fault is None and module.steps_per_rollout > 1:
            completions = module.policy_optimizer.weighs_completions
            fault = log_ratio_fault("old log-probabilities", logprobs, rows.old_logprobs, mask, tolerance, completions)
        return fault

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the record to the file of a guard, and refuses other checkpoints of weights that are not finite.

        Raises:
            GuardError: A weight is not finite, and ``nonfinite`` is ``stop``.
        """
        if self._record is not None:
            checkpoint[GUARD_RECORD] = self._record
        elif self.actions["nonfinite"] == "stop":
            trained = [
                (name, parameter.detach())
                for name, parameter in pl_module.named_parameters()
                if parameter.requires_grad
            ]
            fault = nonfinite_weights(trained)
            if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
                raise GuardError(f"no checkpoint was written: {fault or 'a weight of another process is not finite'}")

    def _check(self, trainer: Trainer, module: PolicyTrainer, guard: str, check: Callable[[], str | None]) -> None:
        """Runs one check. ``identical`` and ``truncated`` must fail in all processes, others in any."""
        action = self.actions[guard]
        if action == "off":
            return
        fault = check()
        in_all = guard in ("identical", "truncated")
        if not trainer.strategy.reduce_boolean_decision(fault is not None, all=in_all):
            return
        self.trips[guard] = self.trips.get(guard, 0) + 1
        module.log(f"guards/{guard}", float(self.trips[guard]), batch_size=1)
        if action == "warn" and self.trips[guard] > 1:
            return
        faults = gathered(fault)
        process = next(rank for rank, text in enumerate(faults) if text is not None)
        reason = f"{faults[process]} (step {trainer.global_step})"
        note = self._save_step(trainer, module, guard, reason, process)
        if action == "stop":
            raise GuardError(f"guard `{guard}`: {reason}; see docs/troubleshooting.md. {note}")
        rank_zero_warn(f"guard `{guard}`: {reason}; later trips are only counted, as guards/{guard}. {note}")

    def _save_step(self, trainer: Trainer, module: PolicyTrainer, guard: str, reason: str, process: int) -> str:
        """Saves the step with the loss and log-probabilities of the process that tripped; a collective call.

        Returns:
            Sentence for the message, which says how to show the step.
        """
        folder = trainer.log_dir or trainer.default_root_dir
        if not self.keep or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
            return "The step was not saved."
        assert module.logprobs is not None and module.step_loss is not None
        path = Path(folder) / "guards" / f"{guard}-step{trainer.global_step}.ckpt"
        numbers = gathered({"loss": float(module.step_loss), "logprobs": module.logprobs.cpu()})[process]
        self._record = {"guard": guard, "reason": reason, "process": process, **numbers}
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._record = None
        return f"To show its completions: python main.py replay --config FILE --ckpt_path {path}"


@dataclass
class ReplayedStep:
    """Loss, log-probabilities and completions of a replayed step.

    Args:
        loss: Loss of the step.
        logprobs: ``[N, T]`` log-probabilities of its completions under the weights of the checkpoint.
        rows: One record per completion.
        record: Record of the guard that wrote the checkpoint: ``guard``, ``reason``, ``process``, ``loss`` (of that
            process), ``logprobs``; None for an ordinary checkpoint.
    """

    loss: float
    logprobs: Tensor
    rows: list[Row]
    record: dict[str, Any] | None


class StepTaken(Exception):
    """Exception that ends a :class:`Replay` before the weights change."""


class Replay(Callback):
    """Stops a resumed ``fit`` before its first backward pass and stores the step in ``step``."""

    sees_nonfinite = True
    """The step is shown even if its numbers are not finite."""

    def __init__(self) -> None:
        self.step: ReplayedStep | None = None
        self._record: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads the record of the guard."""
        self._record = checkpoint.get(GUARD_RECORD)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stores the step.

        Raises:
            StepTaken: Always.
        """
        assert isinstance(pl_module, PolicyTrainer)
        assert pl_module.rows is not None and pl_module.logprobs is not None and pl_module.step_loss is not None
        self.step = ReplayedStep(
            loss=float(pl_module.step_loss),
            logprobs=pl_module.logprobs.cpu(),
            rows=_replayed_rows(pl_module, trainer.global_step),
            record=self._record,
        )
        raise StepTaken


def _replayed_rows(module: PolicyTrainer, step: int) -> list[Row]:
    """Rows of :func:`completion_rows` with ``tokens``, ``ended``, ``log_ratio`` (sum over tokens) and ``kl`` (nats)."""
    batch, logprobs = module.rows, module.logprobs
    assert batch is not None and logprobs is not None
    log_ratio = ((logprobs - batch.old_logprobs) * batch.mask).sum(dim=1)
    kl = torch.full_like(log_ratio, torch.nan)
    if batch.ref_logprobs is not None:
        kl = (k1(batch.old_logprobs, batch.ref_logprobs) * batch.mask).sum(dim=1)
    columns = {"tokens": batch.mask.sum(dim=1), "ended": batch.ended, "log_ratio": log_ratio, "kl": kl}
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = completion_rows(batch, module.preferences, step, len(batch))
    return [row | dict(zip(columns, cells, strict=True)) for row, cells in zip(rows, values, strict=True)]
