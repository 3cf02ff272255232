"""This project's policy stage as a racer, see race.py: does a training step when told so, and says what it took.

python benchmarks/racers.py SPECIFICATION.json
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from turn import Report, take_part, wait
from worlds import KL, RATE, World, data_of

from moslim import PolicyTrainer
from moslim.algorithms import RLOO
from moslim.generation import TorchEngine
from moslim.mapping import ExpectedDistance
from moslim.training import MoslimTrainer


class Turns(Callback):
    """Does one step of a Lightning run per turn and reports its phases."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.marks: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.marks["start"] = wait()
        trainer.strategy.barrier()
        self.marks["cpu"] = time.process_time()

    def on_before_backward(self, *_: Any) -> None:
        self.marks["backward"] = time.perf_counter()

    def on_after_backward(self, *_: Any) -> None:
        self.marks["optimizer"] = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        end = time.perf_counter()
        if not trainer.is_global_zero:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        phases = {name.removeprefix("time/"): value for name, value in logged.items() if name.startswith("time/")}
        phases["backward"] = self.marks["optimizer"] - self.marks["backward"]
        phases["optimizer"] = end - self.marks["optimizer"]
        seconds = end - self.marks["start"]
        phases["rest"] = seconds - sum(phases.values())
        cpu = time.process_time() - self.marks["cpu"]
        self.report(seconds=seconds, cpu=cpu, phases=phases, length=logged["train/length"])


def ours(world: World, folder: Path, steps: int, callbacks: list[Callback], settings: dict[str, Any]) -> None:
    """This project's policy stage; the settings are of passes, decoding and off_policy, and a number of processes."""
    from moslim.generation import Decoding
    from moslim.ops import ForwardConfig
    from moslim.policy import OffPolicy

    options = {
        "engine": TorchEngine(world.new_tokens, decoding=Decoding(**settings.get("decoding", {}))),
        "forward_config": ForwardConfig(**settings.get("forward_config", {})),
        "off_policy": OffPolicy(**settings.get("off_policy", {})),
    }
    count = settings.get("processes", 1)
    second = join(count) if count > 1 else None
    fit(replace(world, prompts=world.prompts // count), folder, steps, callbacks, options, count)
    if second is not None:
        second.wait()


def earlier(world: World, folder: Path, steps: int, callbacks: list[Callback], settings: dict[str, Any]) -> None:
    """The policy stage of an earlier version, whose source is found in place of today's."""
    fit(world, folder, steps, callbacks, {"engine": TorchEngine(world.new_tokens)}, 1)


def fit(world: World, folder: Path, steps: int, callbacks: list[Callback], options: dict[str, Any], count: int) -> None:
    """Trains."""
    module = PolicyTrainer(
        world.preferences,
        str(folder / "policy"),
        str(folder / "classifier"),
        ExpectedDistance(),
        RLOO(kl_coef=KL, importance_sampling_level="sequence"),
        num_generations=world.samples,
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, fused=True),
        **options,
    )
    trainer = MoslimTrainer(
        accelerator="cpu",
        devices=count,
        strategy="ddp" if count > 1 else "auto",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(module, data_of(world))


def join(count: int) -> subprocess.Popen[bytes] | None:
    """Makes this process one of two, as torchrun would: starts the second, or is it. Threads are shared out."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if "RANK" in os.environ:
        return None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ.update(common, TORCHELASTIC_RUN_ID="racers", GROUP_RANK="0")
    ranks = {"RANK": "1", "LOCAL_RANK": "1"}
    second = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **ranks}, stdin=subprocess.DEVNULL)
    os.environ.update(RANK="0", LOCAL_RANK="0")
    return second


def train(specification: dict[str, Any], report: Report) -> None:
    """Trains by the specification, see race.py."""
    racer = {"ours": ours, "earlier": earlier}[specification["racer"]]
    world, folder = World(**specification["world"]), Path(specification["folder"])
    racer(world, folder, specification["steps"], [Turns(report)], specification["settings"])


if __name__ == "__main__":
    take_part(train)
