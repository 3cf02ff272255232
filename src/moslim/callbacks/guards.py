"""Callbacks that stop or warn when training goes wrong, gates between stages, and the replay of a step.

What can be wrong with a rollout or a step. Each function says what it found, or returns None.

A gate: a stage that did not reach its figures fails, instead of handing a bad model to the next one.

Stops or warns when training goes wrong, and keeps the step at which it did.

Takes a step again up to its loss, and shows what became of each answer.
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


def kl_above(logprobs: Tensor, reference: Tensor | None, mask: Tensor, limit: float) -> str | None:
    """Compares the estimated KL divergence to the reference, in nats per answer, with a limit.

    The mean over all processes counts, each of which must ask. The reason is told by those that are not below it.

    Args:
        logprobs: ``[N, T]`` of the sampler.
        reference: ``[N, T]``; None where the run has no reference, and so no divergence.
        mask: ``[N, T]`` bool, answer tokens.
        limit: Nats per answer.
    """
    if reference is None:
        return None
    own = (k1(logprobs, reference) * mask).sum(dim=1).mean()
    kl = mean_over_processes(own)
    if kl <= limit or own < kl:  # false where either is NaN
        return None
    return f"the KL divergence to the reference is {float(kl):.4g} nats per answer, not within {limit:g}"


def off_policy(
    other: str, logprobs: Tensor, old: Tensor, mask: Tensor, tolerance: float, answers: bool = False
) -> str | None:
    """Finds probability ratios that are not 1 where the policy has not changed since it answered.

    Args:
        other: What ``old`` is of.
        logprobs: ``[N, T]`` in the update's forward pass.
        old: ``[N, T]``.
        mask: ``[N, T]`` bool, the answer tokens to compare; may be none.
        tolerance: Greatest mean of ``|log ratio|``; rounding in bfloat16 gives some hundredths per token.
        answers: Whether the ratios of whole answers count, the products of those of their tokens.
    """
    distance, counted = (logprobs - old) * mask, mask
    if answers:
        distance, counted = distance.sum(dim=1), mask.any(dim=1)
    mean = float((distance.abs() * counted).sum() / counted.sum().clamp(min=1))
    if mean <= tolerance:
        return None
    return (
        f"update and {other} disagree before the first step on a rollout: mean |log ratio| over "
        f"{'answers' if answers else 'tokens'} is {mean:.4g}, above {tolerance:g}"
    )


def identical(answers: Sequence[str], samples: int) -> str | None:
    """Finds that all answers to each prompt are the same, so that there is nothing to compare.

    Args:
        answers: ``G * n`` answers, those to one prompt adjacent.
        samples: Answers per prompt, ``n``; with one there is no comparison to lose.
    """
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    if samples < 2 or any(len(set(group)) > 1 for group in groups):
        return None
    return f"the {samples} answers to every prompt are the same, such as {answers[0][:80]!r}"


def truncated(ended: Tensor) -> str | None:
    """Finds that no answer of a rollout ended (``[N]`` bool) before the length limit."""
    return None if bool(ended.any()) else f"all {len(ended)} answers were cut at the length limit"


class GateError(RuntimeError):
    """The metrics of a run are not good enough to go on."""


class Gate(Callback):
    """Compares the logged metrics with thresholds, at the end of ``fit`` and of ``validate``.

    It keeps quiet under ``fast_dev_run``, in the sanity check, and when a run was interrupted.

    Args:
        minimum: Metric name to the least value that passes.
        maximum: Metric name to the greatest value that passes.
    """

    def __init__(self, minimum: dict[str, float], maximum: dict[str, float] | None = None) -> None:
        self.minimum = minimum
        self.maximum = maximum or {}
        if not self.minimum and not self.maximum:
            raise UsageError("Gate: give at least one threshold in `minimum` or `maximum`")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch; the checkpoints are written by then."""
        self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called in ``fit`` as well, where a metric may still grow: only ``validate`` is judged here."""
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
            raise GateError(f"the gate is closed; what an earlier run saved is still in its place:\n  {reasons}")
        _print(metrics, bounds)


def _fault(metrics: dict[str, float], name: str, sign: str, bound: float) -> str | None:
    if name not in metrics:
        close = difflib.get_close_matches(name, metrics) or sorted(metrics)
        return f"{name}: no such metric; did you mean {', '.join(close)}?" if close else f"{name}: nothing was logged"
    value = metrics[name]
    passed = value >= bound if sign == ">=" else value <= bound  # NaN passes neither
    return None if passed else f"{name}: {value:.4g}, wanted {sign} {bound:g}"


@rank_zero_only
def _print(metrics: dict[str, float], bounds: list[tuple[str, str, float]]) -> None:
    rows = [[name, f"{metrics[name]:.4g}", f"{sign} {bound:g}"] for name, sign, bound in bounds]
    print(console_table("gate passed", ["metric", "value", "wanted"], {"": rows}))


Action = Literal["stop", "warn", "off"]


class GuardError(RuntimeError):
    """A guard stopped the run."""


class Guards(Callback):
    """Looks at every rollout and loss before the weights change; docs/troubleshooting.md says what to do about each.

    A guard that stops raises :class:`GuardError`: no step is taken and no checkpoint written over, so the last one is
    as good as it was. The step itself, that is rollout, weights and states, goes to ``guards/<guard>-step<n>.ckpt`` in
    the run's folder; ``python main.py replay --ckpt_path`` shows it row by row. A guard that warns does so once, keeps
    that step too, and counts the others as ``guards/<guard>``. Under several processes all stop together.

    Args:
        nonfinite: NaN or infinity in a rollout (log-probabilities of policy and reference, the classifier's
            probabilities, rewards, the critic's values, advantages), in the loss, or, when a checkpoint is to be
            written, in a weight.
        kl: The KL divergence to the reference is above ``kl_limit``; needs a ``kl_coef`` above 0.
        ratio: Update and engine disagree about a rollout's probabilities before its first step; or the update and the
            old log-probabilities that later steps are clipped by do, of tokens or of whole answers as the optimizer
            clips them.
        identical: The answers to each prompt are all the same.
        truncated: Every answer of a rollout was cut at the length limit.
        kl_limit: Nats per answer, like the metric ``train/kl``.
        ratio_tolerance: Greatest mean ``|log ratio|`` over tokens, or answers; bfloat16 needs some hundredths.
        keep: Whether to write the file.

    Raises:
        UsageError: An action is unknown, or a limit is not above 0.
    """

    sees_nonfinite = True
    """The module leaves to it what is not finite."""

    def __init__(
        self,
        nonfinite: Action = "stop",
        kl: Action = "stop",
        ratio: Action = "warn",
        identical: Action = "stop",
        truncated: Action = "warn",
        kl_limit: float = 100.0,
        ratio_tolerance: float = 0.05,
        keep: bool = True,
    ) -> None:
        self.actions: dict[str, Action] = {
            "nonfinite": nonfinite,
            "kl": kl,
            "ratio": ratio,
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
        """Refuses a module that has no rollouts.

        Raises:
            UsageError: The module is no PolicyTrainer.
        """
        if not isinstance(pl_module, PolicyTrainer):
            raise UsageError(f"Guards watch a PolicyTrainer, not a {type(pl_module).__name__}")
        self.trips.clear()  # of an earlier run; a checkpoint's are taken up after this

    def state_dict(self) -> dict[str, Any]:
        """How often each guard has tripped."""
        return {"trips": dict(self.trips)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting there."""
        self.trips = dict(state_dict["trips"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes where in the life of a rollout the step is."""
        self._batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss and, when it is first used, at the rollout.

        Raises:
            GuardError: A guard that stops the run has tripped.
        """
        module: Any = pl_module
        rollout, rows = module.rollout, module.rows
        checks: dict[str, Callable[[], str | None]] = {}
        if self._batch_idx % module.batch_repeats == 0:
            reference = rollout.ref_logprobs
            updated = rows.update_mask  # answers that nothing needs are not computed
            checks = {
                "nonfinite": rollout.nonfinite,
                "kl": lambda: kl_above(rollout.old_logprobs, reference, rollout.mask, self.kl_limit),
                "ratio": lambda: self._ratios(module, updated),
                "identical": lambda: identical(rollout.answers, module.num_generations),
                "truncated": lambda: truncated(rollout.ended),
            }
        for guard, find in checks.items():
            self._check(trainer, module, guard, find)
        self._check(trainer, module, "nonfinite", lambda: nonfinite("the loss", loss.detach()))

    def _ratios(self, module: Any, updated: Tensor) -> str | None:
        rows, now, tolerance = module.rows, module.logprobs, self.ratio_tolerance
        by_engine = rows.old_logprobs if rows.engine_logprobs is None else rows.engine_logprobs
        reason = off_policy("engine", now, by_engine, updated, tolerance)
        if reason is None and module.steps_per_rollout > 1:
            answers = module.policy_optimizer.weighs_completions
            reason = off_policy("old log-probabilities", now, rows.old_logprobs, updated, tolerance, answers)
        return reason

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the reason to a guard's own file; keeps others from being written with weights that are broken.

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

    def _check(self, trainer: Trainer, module: PolicyTrainer, guard: str, find: Callable[[], str | None]) -> None:
        """Looks for one fault. Only what concerns all answers must hold in every process."""
        action = self.actions[guard]
        if action == "off":
            return
        reason = find()
        for_all = guard in ("identical", "truncated")
        if not trainer.strategy.reduce_boolean_decision(reason is not None, all=for_all):
            return
        self.trips[guard] = self.trips.get(guard, 0) + 1
        module.log(f"guards/{guard}", float(self.trips[guard]), batch_size=1)
        if action == "warn" and self.trips[guard] > 1:
            return
        reasons = gathered(reason)
        process = next(rank for rank, found in enumerate(reasons) if found is not None)
        reason = f"{reasons[process]} (step {trainer.global_step})"
        kept = self._keep(trainer, module, guard, reason, process)
        if action == "stop":
            raise GuardError(f"guard `{guard}`: {reason}; docs/troubleshooting.md says what to do. {kept}")
        rank_zero_warn(f"guard `{guard}`: {reason}; further ones are only counted, as guards/{guard}. {kept}")

    def _keep(self, trainer: Trainer, module: PolicyTrainer, guard: str, reason: str, process: int) -> str:
        """Writes the step down as a checkpoint, with the figures of the process that tripped; every one must ask."""
        folder = trainer.log_dir or trainer.default_root_dir
        if not self.keep or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
            return "The step was not kept."
        assert module.logprobs is not None and module.step_loss is not None
        path = Path(folder) / "guards" / f"{guard}-step{trainer.global_step}.ckpt"
        own = gathered({"loss": float(module.step_loss), "logprobs": module.logprobs.cpu()})[process]
        self._record = {"guard": guard, "reason": reason, "process": process, **own}
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._record = None
        return f"To see it row by row: python main.py replay --config FILE --ckpt_path {path}"


@dataclass
class Replayed:
    """A step as it was taken again.

    Args:
        loss: Its loss.
        logprobs: ``[N, T]`` of its answers under the weights of the checkpoint.
        rows: One record per answer.
        record: What the guard that wrote the checkpoint noted: ``guard``, ``reason``, ``process``, ``loss`` (that
            process's part of it), ``logprobs``; None in an ordinary checkpoint.
    """

    loss: float
    logprobs: Tensor
    rows: list[Row]
    record: dict[str, Any] | None


class StepTaken(Exception):
    """Ends the run of a :class:`Replay` before the weights change."""


class Replay(Callback):
    """Lets ``fit`` resume and stops it at the first backward pass, with the step's numbers in ``found``."""

    sees_nonfinite = True
    """A step is shown also where its numbers are not finite."""

    def __init__(self) -> None:
        self.found: Replayed | None = None
        self._record: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads what the guard noted."""
        self._record = checkpoint.get(GUARD_RECORD)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the numbers.

        Raises:
            StepTaken: Always.
        """
        assert isinstance(pl_module, PolicyTrainer)
        assert pl_module.rows is not None and pl_module.logprobs is not None and pl_module.step_loss is not None
        self.found = Replayed(
            loss=float(pl_module.step_loss),
            logprobs=pl_module.logprobs.cpu(),
            rows=_rows(pl_module, trainer.global_step),
            record=self._record,
        )
        raise StepTaken


def _rows(module: PolicyTrainer, step: int) -> list[Row]:
    """The answers with ``tokens``, ``ended``, ``log_ratio`` (sum over tokens) and ``kl`` (nats; None without)."""
    part, now = module.rows, module.logprobs
    assert part is not None and now is not None
    log_ratio = ((now - part.old_logprobs) * part.mask).sum(dim=1)
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
