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
from moslim.callbacks.dashboards import Row, answer_rows
from moslim.ops.numerics import nonfinite
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.training.checkpoint_files import GUARD_RECORD
from moslim.training.distributed import gathered, mean_over_processes
from moslim.training.optim import nonfinite_weights
from moslim.utils.errors import UsageError
from moslim.utils.files import console_table


def kl_above(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, limit: float) -> str | None:
    """Checks that the estimated KL divergence to the reference, averaged over all processes, is within a limit.

    All processes must call it. Those whose own divergence is not below the mean return the fault.

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


def off_policy(
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
    distance, counted = (logprobs - old_logprobs) * mask, mask
    if completions:
        distance, counted = distance.sum(dim=1), mask.any(dim=1)
    mean = float((distance.abs() * counted).sum() / counted.sum().clamp(min=1))
    if mean <= tolerance:
        return None
    return (
        f"update and {source} disagree before the first step on a rollout: mean |log ratio| over "
        f"{'completions' if completions else 'tokens'} is {mean:.4g}, above {tolerance:g}"
    )


def identical(completions: Sequence[str], num_generations: int) -> str | None:
    """Checks that the completions of some prompt differ, so that their rewards can be compared.

    Args:
        completions: ``B * n`` texts, those of one prompt adjacent.
        num_generations: Completions per prompt, ``n``; the check passes for 1.
    """
    groups = [completions[i : i + num_generations] for i in range(0, len(completions), num_generations)]
    if num_generations < 2 or any(len(set(group)) > 1 for group in groups):
        return None
    return f"the {num_generations} completions of every prompt are the same, such as {completions[0][:80]!r}"


def truncated(ended: Tensor) -> str | None:
    """Checks that some completion of a rollout ended (``[N]`` bool) before the length limit."""
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
        bounds = [(name, ">=", least) for name, least in self.minimum.items()]
        bounds += [(name, "<=", most) for name, most in self.maximum.items()]
        faults = [fault for name, sign, bound in bounds if (fault := _fault(metrics, name, sign, bound))]
        if faults:
            reasons = "\n  ".join(faults)
            raise GateError(f"the gate is closed; results of earlier runs are still in place:\n  {reasons}")
        _print_passed(metrics, bounds)


def _fault(metrics: dict[str, float], name: str, sign: str, bound: float) -> str | None:
    if name not in metrics:
        close = difflib.get_close_matches(name, metrics) or sorted(metrics)
        return f"{name}: no such metric; did you mean {', '.join(close)}?" if close else f"{name}: nothing was logged"
    value = metrics[name]
    passed = value >= bound if sign == ">=" else value <= bound  # both false for NaN
    return None if passed else f"{name}: {value:.4g}, wanted {sign} {bound:g}"


@rank_zero_only
def _print_passed(metrics: dict[str, float], bounds: list[tuple[str, str, float]]) -> None:
    rows = [[name, f"{metrics[name]:.4g}", f"{sign} {bound:g}"] for name, sign, bound in bounds]
    print(console_table("gate passed", ["metric", "value", "wanted"], {"": rows}))


Action = Literal["stop", "warn", "off"]


class GuardError(RuntimeError):
    """Stop of a run by a guard."""


class Guards(Callback):
    """Checks every rollout and loss before the weights change; docs/troubleshooting.md lists the remedies.

    With the action ``stop`` a guard raises :class:`GuardError` before the step, so that weights and checkpoints stay as
    they are; all processes stop together. The step (rollout, weights and states) is saved to
    ``guards/<guard>-step<n>.ckpt`` in the run's folder; ``python main.py replay --ckpt_path`` shows its completions.
    With ``warn`` a guard warns and saves the step the first time, and counts all times as ``guards/<guard>``.

    Args:
        nonfinite: Action for NaN or infinity in a rollout (log-probabilities of policy and reference, the classifier's
            probabilities, rewards, the critic's values, advantages), in the loss, or in a weight when a checkpoint is
            written.
        kl: Action for a KL divergence to the reference above ``kl_limit``; needs a ``kl_coef`` above 0.
        log_ratio: Action for probability ratios that are not 1 before the first step on a rollout: of the update to the
            engine, or to the old log-probabilities that later steps are clipped by. The ratios are those of tokens, or
            for old log-probabilities of whole completions if the optimizer clips these.
        identical: Action for equal completions of each prompt.
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
            raise UsageError(f"guards.kl_limit is {kl_limit}, ratio_tolerance {ratio_tolerance}: give more than 0")
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
            raise UsageError(f"Guards watch a PolicyTrainer, not a {type(pl_module).__name__}")
        self.trips.clear()  # those of a checkpoint are loaded later

    def state_dict(self) -> dict[str, Any]:
        """Number of trips by guard."""
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
                "kl": lambda: kl_above(rollout.old_logprobs, ref_logprobs, rollout.mask, self.kl_limit),
                "log_ratio": lambda: self._off_policy(module, update_mask),
                "identical": lambda: identical(rollout.answers, module.num_generations),
                "truncated": lambda: truncated(rollout.ended),
            }
        for guard, check in checks.items():
            self._check(trainer, module, guard, check)
        self._check(trainer, module, "nonfinite", lambda: nonfinite("the loss", loss.detach()))

    def _off_policy(self, module: Any, mask: Tensor) -> str | None:
        rows, logprobs, tolerance = module.rows, module.logprobs, self.ratio_tolerance
        engine_logprobs = rows.old_logprobs if rows.engine_logprobs is None else rows.engine_logprobs
        reason = off_policy("engine", logprobs, engine_logprobs, mask, tolerance)
        if reason is None and module.steps_per_rollout > 1:
            completions = module.policy_optimizer.weighs_completions
            reason = off_policy("old log-probabilities", logprobs, rows.old_logprobs, mask, tolerance, completions)
        return reason

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the reason to the file of a guard, and prevents other checkpoints of weights that are not finite.

        Raises:
            GuardError: A weight is not finite, and ``nonfinite`` is ``stop``.
        """
        if self._record is not None:
            checkpoint[GUARD_RECORD] = self._record
        elif self.actions["nonfinite"] == "stop":
            trained = [(name, p.detach()) for name, p in pl_module.named_parameters() if p.requires_grad]
            reason = nonfinite_weights(trained)
            if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
                raise GuardError(f"no checkpoint was written: {reason or 'a weight of another process is not finite'}")

    def _check(self, trainer: Trainer, module: PolicyTrainer, guard: str, check: Callable[[], str | None]) -> None:
        """Runs one check. ``identical`` and ``truncated`` must fail in all processes, others in any."""
        action = self.actions[guard]
        if action == "off":
            return
        reason = check()
        in_all = guard in ("identical", "truncated")
        if not trainer.strategy.reduce_boolean_decision(reason is not None, all=in_all):
            return
        self.trips[guard] = self.trips.get(guard, 0) + 1
        module.log(f"guards/{guard}", float(self.trips[guard]), batch_size=1)
        if action == "warn" and self.trips[guard] > 1:
            return
        reasons = gathered(reason)
        process = next(rank for rank, text in enumerate(reasons) if text is not None)
        reason = f"{reasons[process]} (step {trainer.global_step})"
        kept = self._keep(trainer, module, guard, reason, process)
        if action == "stop":
            raise GuardError(f"guard `{guard}`: {reason}; see docs/troubleshooting.md. {kept}")
        rank_zero_warn(f"guard `{guard}`: {reason}; later trips are only counted, as guards/{guard}. {kept}")

    def _keep(self, trainer: Trainer, module: PolicyTrainer, guard: str, reason: str, process: int) -> str:
        """Saves the step as a checkpoint, with the numbers of the process that tripped; all processes must call it."""
        folder = trainer.log_dir or trainer.default_root_dir
        if not self.keep or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
            return "The step was not kept."
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
class Replayed:
    """Numbers of a replayed step.

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
    """Stops a resumed ``fit`` before its first backward pass, with the numbers of the step in ``found``."""

    sees_nonfinite = True
    """The step is shown even if its numbers are not finite."""

    def __init__(self) -> None:
        self.found: Replayed | None = None
        self._record: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads the record of the guard."""
        self._record = checkpoint.get(GUARD_RECORD)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stores the numbers.

        Raises:
            StepTaken: Always.
        """
        assert isinstance(pl_module, PolicyTrainer)
        assert pl_module.rows is not None and pl_module.logprobs is not None and pl_module.step_loss is not None
        self.found = Replayed(
            loss=float(pl_module.step_loss),
            logprobs=pl_module.logprobs.cpu(),
            rows=_replayed_rows(pl_module, trainer.global_step),
            record=self._record,
        )
        raise StepTaken


def _replayed_rows(module: PolicyTrainer, step: int) -> list[Row]:
    """Rows of :func:`answer_rows` with ``tokens``, ``ended``, ``log_ratio`` (sum over tokens) and ``kl`` (nats)."""
    part, logprobs = module.rows, module.logprobs
    assert part is not None and logprobs is not None
    log_ratio = ((logprobs - part.old_logprobs) * part.mask).sum(dim=1)
    kl = torch.full_like(log_ratio, torch.nan)
    if part.ref_logprobs is not None:
        kl = (k1(part.old_logprobs, part.ref_logprobs) * part.mask).sum(dim=1)
    figures = zip(part.mask.sum(dim=1).tolist(), part.ended.tolist(), log_ratio.tolist(), kl.tolist(), strict=True)
    return [
        {**row, "tokens": tokens, "ended": ended, "log_ratio": ratio, "kl": divergence}
        for row, (tokens, ended, ratio, divergence) in zip(
            answer_rows(part, module.preferences, step, len(part)), figures, strict=True
        )
    ]
