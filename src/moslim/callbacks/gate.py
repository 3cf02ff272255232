"""A gate: a stage that did not reach its figures fails, instead of handing a bad model to the next one."""

from __future__ import annotations

import difflib

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moslim.errors import UsageError
from moslim.reporting import console_table


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
