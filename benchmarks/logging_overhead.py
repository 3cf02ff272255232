"""Question: what share of a quickstart step do logging, guards and dashboards cost, with everything on?

    python benchmarks/logging_overhead.py

The quickstart's policy is trained several times, in turn with everything on (W&B offline, CSV, progress bar, gauges,
guards, completion table, gold metrics) and with nothing logged at all. Both take the same steps on the same answers; so
each step's median over the runs is compared with its twin's.
Last result: benchmarks/results/logging_overhead.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cells import World
from common import RESULTS, ROOT, circumstances, write
from lightning.pytorch import Callback, LightningModule, Trainer

from moslim import PolicyTrainer
from moslim.cli import run

WARM_UP = 3
WORLD = World(seed=0, fold=0)
CONFIG = ["--config", "configs/quickstart/policy.yaml", *WORLD.models]
PLAIN = ["--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false"]
ARMS = {
    "on": ["--config", "configs/logger/wandb.yaml", "--trainer.callbacks+", "logging_overhead.StepTimes"],
    "off": [
        *["--model", "logging_overhead.Silent", "--model.judge", "null", "--trainer.log_every_n_steps", "0"],
        *["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"],
        *["--trainer.callbacks", "[logging_overhead.StepTimes]"],
    ],
}


class Silent(PolicyTrainer):
    """A policy that logs nothing."""

    def log(self, *args: Any, **options: Any) -> None:
        """Does nothing."""

    def log_dict(self, *args: Any, **options: Any) -> None:
        """Does nothing."""


class StepTimes(Callback):
    """Seconds from the beginning of each step to that of the next, so that what Lightning logs in between counts."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the time."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the last, and those that warm up."""
        return [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)][WARM_UP:]


def measure(arm: str, steps: int, folder: Path) -> list[float]:
    """Trains once and returns the seconds of each step."""
    import wandb

    places = ["--trainer.default_root_dir", str(folder / arm), "--trainer.max_steps", str(steps)]
    if arm == "on":
        places += ["--trainer.logger.save_dir", str(folder)]
    cli = run(["fit", *CONFIG, *ARMS[arm], *PLAIN, *places])
    wandb.finish()
    (times,) = (callback for callback in cli.trainer.callbacks if type(callback).__name__ == StepTimes.__name__)
    found: list[float] = times.seconds  # type: ignore[attr-defined]  # imported under another module name
    return found


def main() -> None:
    """Runs the arms in turn and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=104, help="training steps per run; the last is not timed")
    parser.add_argument("--runs", type=int, default=3, help="runs of each arm")
    parser.add_argument("--out", type=Path, default=RESULTS / "logging_overhead.json")
    options = parser.parse_args()
    WORLD.make()
    runs: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in range(options.runs):
        for arm, found in runs.items():
            found.append(measure(arm, options.steps, ROOT / "outputs" / "logging_overhead"))
    steps = {arm: [median(times) for times in zip(*found, strict=True)] for arm, found in runs.items()}
    total = {arm: sum(times) for arm, times in steps.items()}
    result = {
        **circumstances(),
        "share_of_step": round(total["on"] / total["off"] - 1, 4),
        "seconds_per_step": {arm: round(total[arm] / len(times), 5) for arm, times in steps.items()},
        "steps": len(steps["on"]),
        "runs": {arm: [round(sum(times), 3) for times in found] for arm, found in runs.items()},
        "wanted": "< 0.03",
    }
    write(options.out, result)
    print(f"logging costs {100 * result['share_of_step']:.2f}% of a step: {result['seconds_per_step']}")


if __name__ == "__main__":
    main()
