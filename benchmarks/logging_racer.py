"""The quickstart's policy as a racer, see race.py, with everything logged or nothing; part of logging_overhead.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from cells import World
from lightning.pytorch import Callback
from turn import Report, take_part, wait

from moslim import PolicyTrainer
from moslim.cli import run

CONFIG = ["--config", "configs/quickstart/policy.yaml"]
PLAIN = ["--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false"]
ARMS = {
    "on": ["--config", "configs/logger/wandb.yaml", "--trainer.callbacks+", "logging_racer.Turns"],
    "off": [
        *["--model", "logging_racer.Silent", "--model.judge", "null", "--trainer.log_every_n_steps", "0"],
        *["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"],
        *["--trainer.callbacks", "[logging_racer.Turns]"],
    ],
}
_REPORT: list[Report] = []


class Silent(PolicyTrainer):
    """A policy that logs nothing."""

    def log(self, *args: Any, **options: Any) -> None:
        """Does nothing."""

    def log_dict(self, *args: Any, **options: Any) -> None:
        """Does nothing."""

    def record(self, values: Any) -> None:
        """Does nothing."""


class Turns(Callback):
    """One step per turn, from its beginning to where the next would begin: so what Lightning logs in between counts."""

    def __init__(self) -> None:
        self.start: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """Ends a turn and waits for the next."""
        if self.start is not None:
            _REPORT[0](seconds=time.perf_counter() - self.start)
        self.start = wait()


def train(specification: dict[str, Any], report: Report) -> None:
    """Trains until nobody wants to know of further steps."""
    _REPORT.append(report)
    folder, arm, world = Path(specification["folder"]), specification["arm"], World(**specification["world"])
    places = ["--trainer.default_root_dir", str(folder / arm)]
    if arm == "on":
        places += ["--trainer.logger.save_dir", str(folder)]
    run(["fit", *CONFIG, *world.models, *ARMS[arm], *PLAIN, *places])


if __name__ == "__main__":
    sys.modules["logging_racer"] = sys.modules["__main__"]  # what the command line names is what runs here
    take_part(train)
