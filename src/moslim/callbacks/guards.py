"""Stops or warns when training goes wrong, and keeps the step at which it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from moslim.callbacks import faults
from moslim.checkpoint_files import GUARD_RECORD
from moslim.errors import UsageError
from moslim.optim import nonfinite_weights
from moslim.policy.module import PolicyTrainer
from moslim.precision import nonfinite
from moslim.processes import gathered

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
            reference = rollout.reference_logprobs
            updated = rows.update_mask  # answers that nothing needs are not computed
            checks = {
                "nonfinite": rollout.nonfinite,
                "kl": lambda: faults.kl_above(rollout.old_logprobs, reference, rollout.mask, self.kl_limit),
                "ratio": lambda: self._ratios(module, updated),
                "identical": lambda: faults.identical(rollout.answers, module.samples_per_prompt),
                "truncated": lambda: faults.truncated(rollout.ended),
            }
        for guard, find in checks.items():
            self._check(trainer, module, guard, find)
        self._check(trainer, module, "nonfinite", lambda: nonfinite("the loss", loss.detach()))

    def _ratios(self, module: Any, updated: Tensor) -> str | None:
        rows, now, tolerance = module.rows, module.logprobs, self.ratio_tolerance
        by_engine = rows.old_logprobs if rows.engine_logprobs is None else rows.engine_logprobs
        reason = faults.off_policy("engine", now, by_engine, updated, tolerance)
        if reason is None and module.steps_per_rollout > 1:
            answers = module.policy_optimizer.weighs_answers
            reason = faults.off_policy("old log-probabilities", now, rows.old_logprobs, updated, tolerance, answers)
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
