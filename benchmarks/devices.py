"""Question: do two processes train what one does on the same global batch?

    python benchmarks/devices.py

Twenty steps of SGD in double precision with every policy optimizer, in one process, and in two of half the batch size
with DDP and with FSDP2 (configs/trainer/, on CPU). After each step the sampled answers and the trained weights are
compared. Two kinds of models, see ``MODELS``.
Last result: benchmarks/results/devices.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, circumstances, write
from processes import Launch
from tiny import OPTIMIZERS, policy_config, save_models

STEPS, PROMPTS, WANTED, LIMIT = 20, 4, 1e-5, 1200.0
STRATEGIES = ("ddp", "fsdp")
MODELS: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": {"forward_config": {"share_prefixes": "never"}}}
"""Architecture and options. Transformers computes Llama's norms in float32. What texts begin with is therefore computed
for each of them: a shared beginning is computed in another shape by one process than by two, of which float32 makes a
difference of 1e-8 in the first step, and twenty steps at this rate 1e-1."""


def train(folder: Path, models: Path, kind: str, optimizer: str, strategy: str | None = None) -> list[dict[str, Any]]:
    """Runs it, in two processes if a strategy is named, and returns its checkpoints, one per step."""
    processes = 1 if strategy is None else 2
    folder.mkdir(parents=True)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    config = policy_config(models, optimizer, PROMPTS // processes, optimizer=sgd, **MODELS[kind])
    config["model"]["init_args"]["dtype"] = "float64"
    config["trainer"] |= {"default_root_dir": str(folder), "max_steps": STEPS}
    config["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "save_last": False}
    (folder / "config.json").write_text(json.dumps(config))
    several = ["--config", str(ROOT / f"configs/trainer/{strategy}.yaml"), "--trainer.devices", "2"] if strategy else []
    command = ["fit", "--config", str(folder / "config.json"), *several]
    Launch(command, processes, folder / "log.txt").wait(LIMIT)
    files = folder / "version_0/checkpoints"
    return [torch.load(files / f"step={step}.ckpt", weights_only=True) for step in range(1, STEPS + 1)]


def compare(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether all answers are the same, and the largest difference of a weight."""
    answers, largest = True, 0.0
    for whole, halves in zip(one, two, strict=True):
        rollouts = [
            [row for part in run["policy_run"]["rollouts"] for row in part["completion_texts"]]
            for run in (whole, halves)
        ]
        answers = answers and rollouts[0] == rollouts[1]
        for name, value in whole["state_dict"].items():
            largest = max(largest, float((value - halves["state_dict"][name]).abs().max()))
    return {"same_answers": answers, "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "devices.json")
    parser.add_argument("--only", default="", help="cells whose name begins like this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, name in product(MODELS, OPTIMIZERS):
            models = Path(temporary) / kind
            if not models.exists():
                save_models(models, kind)
            strategies = [strategy for strategy in STRATEGIES if f"{kind}/{name}/{strategy}".startswith(options.only)]
            alone = train(Path(temporary) / f"{kind}-{name}", models, kind, name) if strategies else []
            for strategy in strategies:
                cell = f"{kind}/{name}/{strategy}"
                folder = Path(temporary) / cell.replace("/", "-")
                found[cell] = compare(alone, train(folder, models, kind, name, strategy))
                print(f"{cell}: {found[cell]}", flush=True)
    write(options.out, {**circumstances(), "steps": STEPS, "wanted": WANTED, "cells": found})
    if not all(cell["same_answers"] and cell["largest"] <= WANTED for cell in found.values()):
        raise SystemExit("two processes do not train what one does")


if __name__ == "__main__":
    main()
