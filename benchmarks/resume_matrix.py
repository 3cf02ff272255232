"""Question: is a run that was stopped and resumed, bit by bit, the run that was not?

    python benchmarks/resume_matrix.py

Every policy optimizer, stopped by Ctrl-C, SIGTERM and SIGKILL at a random moment, by an exception and by ``max_steps``,
on one process and on two (DDP, gloo), then resumed by ``fit --ckpt_path last``. Equal means: every training batch's
loss, requests, tokens, advantages and weights after it, before and after the stop; and the last checkpoint's weights,
optimizer, schedule, running statistics, KL coefficient, sampler and rollout. Rollouts are used four times and two
batches make a step, so that most stops fall into an accumulation or between checkpoints, which are written every second
step.
Last result: benchmarks/results/resume_matrix.json.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write
from processes import Launch
from tiny import OPTIMIZERS, policy_config, save_models
from tracing import Step, read, same

STEPS, BATCHES_PER_STEP, REPEATS, BATCHES_PER_EPOCH = 14, 2, 4, 12
SIGNALS = {"ctrl_c": signal.SIGINT, "sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}
STOPS = (*SIGNALS, "exception", "max_steps")
LIMIT = 120.0
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "PreferenceDataModule", "policy_run", "callbacks")


class Run:
    """A run's folder, which several launches may continue.

    Args:
        folder: Where it is.
        models: Where its models are.
        optimizer: Name of its policy optimizer.
        processes: Number of processes.
    """

    def __init__(self, folder: Path, models: Path, optimizer: str, processes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.processes = folder, processes
        config = policy_config(
            models,
            optimizer,
            batch_size=4 // processes,
            num_iterations=2,
            minibatches=REPEATS // 2,
            lr_scheduler={"class_path": "moslim.training.WarmupDecay", "init_args": {"warmup_steps": 5, "final": 1.0}},
        )
        config["trainer"] |= {
            "default_root_dir": str(folder),
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "accumulate_grad_batches": BATCHES_PER_STEP,
            "gradient_clip_val": 1.0,
            "limit_train_batches": BATCHES_PER_EPOCH,
            "callbacks": [{"class_path": "tracing.Trace", "init_args": {"path": str(folder / "trace")}}],
        }
        config["checkpoint"] = {"every_n_train_steps": 2}
        (folder / "config.json").write_text(json.dumps(config))

    def launch(self, *options: str, steps: int = STEPS) -> Launch:
        """Starts it."""
        command = ["fit", "--config", str(self.folder / "config.json"), "--trainer.max_steps", str(steps)]
        return Launch([*command, *options], self.processes, self.folder / "log.txt")

    def traces(self) -> list[list[Step]]:
        """Each process's."""
        return [read(self.folder / f"trace.{rank}") for rank in range(self.processes)]

    def last(self) -> dict[str, Any]:
        """The newest checkpoint."""
        found = max(self.folder.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        checkpoint: dict[str, Any] = torch.load(found, weights_only=True)
        checkpoint["callbacks"] = {
            key: state for key, state in checkpoint["callbacks"].items() if "Checkpoint" not in key.partition("{")[0]
        }  # that one's holds paths
        return checkpoint


def stop(run: Run, kind: str, generator: random.Random) -> int:
    """Starts a run and stops it; returns the number of batches that it did."""
    batch = generator.randrange(5, (STEPS - 2) * BATCHES_PER_STEP)
    if kind not in SIGNALS:
        failing = ["--trainer.callbacks+", "tracing.Fail", "--trainer.callbacks.batch", str(batch)]
        steps, options = (STEPS, failing) if kind == "exception" else (batch // BATCHES_PER_STEP, [])
        run.launch(*options, steps=steps).wait(LIMIT)
        return len(run.traces()[0])
    launched, end = run.launch(), time.monotonic() + LIMIT
    while len(run.traces()[0]) < batch and launched.running() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(generator.random() * 0.05)
    launched.send(SIGNALS[kind])
    launched.wait(LIMIT)
    return len(run.traces()[0])


def difference(whole: Run, cut: Run, done: int) -> str | None:
    """What differs first, in words."""
    for rank, (steps, wanted) in enumerate(zip(cut.traces(), whole.traces(), strict=True)):
        if len(wanted) != STEPS * BATCHES_PER_STEP:
            return f"the whole run did {len(wanted)} batches"
        places = {tuple(step["place"]): step for step in wanted}
        for step in steps:
            if step != places[tuple(step["place"])]:
                keys = [key for key in step if step[key] != places[tuple(step["place"])][key]]
                return f"process {rank}, batch {step['place']}: {', '.join(keys)}"
        if not done < len(wanted) or steps[-1] != wanted[-1]:
            return f"process {rank} did {done} batches, then {len(steps) - done}, of {len(wanted)}"
        if steps[done:][0]["place"] == wanted[0]["place"]:
            return f"process {rank} began anew"
    one, other = whole.last(), cut.last()
    unequal = [part for part in PARTS if not same(one[part], other[part])]
    return f"checkpoint: {', '.join(unequal)}" if unequal else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "resume_matrix.json")
    parser.add_argument("--only", default="", help="cells whose name begins like this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are stopped")
    parser.add_argument("--keep", type=Path, help="new folder that keeps the runs, for a look at what differs")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background shells ignore it, as would the runs
    torch.set_num_threads(1)
    cells: dict[str, bool] = {}
    differences: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = (options.keep or Path(temporary)).resolve()
        models = place / "models"
        save_models(models)
        for optimizer in OPTIMIZERS:
            for processes in (1, 2):
                names = {kind: f"{optimizer}/{kind}/{processes}" for kind in STOPS}
                names = {kind: name for kind, name in names.items() if name.startswith(options.only)}
                if not names:
                    continue
                whole = Run(place / f"{optimizer}/whole/{processes}", models, optimizer, processes)
                whole.launch().wait(LIMIT)
                for kind, name in names.items():
                    run = Run(place / name, models, optimizer, processes)
                    done = stop(run, kind, random.Random(f"{options.seed} {name}"))
                    run.launch("--ckpt_path", "last").wait(LIMIT)
                    found = difference(whole, run, done)
                    cells[name] = found is None
                    if found:
                        differences[name] = found
                    print(f"{name}: stopped after {done} batches: {found or 'equal'}", flush=True)
    steps = {"steps": STEPS, "batches_per_step": BATCHES_PER_STEP, "batches_per_rollout": REPEATS}
    write(options.out, {**circumstances(), **steps, "cells": cells, "differences": differences})
    if differences:
        raise SystemExit(f"{len(differences)} of {len(cells)} cells differ")


if __name__ == "__main__":
    main()
