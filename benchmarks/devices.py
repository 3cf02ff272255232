"""Question: do two processes train what one does on the same global batch?

    python benchmarks/devices.py

Twenty steps of SGD in double precision with every policy optimizer, once in one process, once in two of half the batch
size (configs/trainer/ddp.yaml on CPU). After each step the sampled answers and the trained weights are compared.
Last result: benchmarks/results/devices.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, circumstances, write
from processes import Launch
from tiny import OPTIMIZERS, policy_config, save_models

STEPS, PROMPTS, WANTED, LIMIT = 20, 4, 1e-5, 240.0


def train(folder: Path, models: Path, optimizer: str, processes: int) -> list[dict[str, Any]]:
    """Runs it and returns its checkpoints, one per step."""
    folder.mkdir(parents=True)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    config = policy_config(models, optimizer, PROMPTS // processes, optimizer=sgd)
    config["trainer"] |= {"default_root_dir": str(folder), "precision": "64-true", "max_steps": STEPS}
    config["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_last": False}
    (folder / "config.json").write_text(json.dumps(config))
    several = ["--config", str(ROOT / "configs/trainer/ddp.yaml"), "--trainer.devices", str(processes)]
    command = ["fit", "--config", str(folder / "config.json"), *(several if processes > 1 else [])]
    Launch(command, processes, folder / "log.txt").wait(LIMIT)
    files = folder / "version_0/checkpoints"
    return [torch.load(files / f"step={step}.ckpt", weights_only=True) for step in range(1, STEPS + 1)]


def compare(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether all answers are the same, and the largest difference of a weight."""
    answers, largest = True, 0.0
    for whole, halves in zip(one, two, strict=True):
        rollouts = [
            [row for part in run["policy_run"]["rollouts"] for row in part["answers"]] for run in (whole, halves)
        ]
        answers = answers and rollouts[0] == rollouts[1]
        for name, value in whole["state_dict"].items():
            largest = max(largest, float((value - halves["state_dict"][name]).abs().max()))
    return {"same_answers": answers, "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "devices.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary) / "models"
        save_models(models)
        for name in OPTIMIZERS:
            runs = [train(Path(temporary) / f"{name}{count}", models, name, count) for count in (1, 2)]
            found[f"{name}/ddp"] = compare(*runs)
            print(f"{name}/ddp: {found[f'{name}/ddp']}", flush=True)
    write(options.out, {**circumstances(), "steps": STEPS, "wanted": WANTED, "cells": found})
    if not all(cell["same_answers"] and cell["largest"] <= WANTED for cell in found.values()):
        raise SystemExit("two processes do not train what one does")


if __name__ == "__main__":
    main()
