"""One trainer in one process: does a training step when told so on its input, and says on its output what it took.

    python benchmarks/racers.py SPECIFICATION.json

Started by race.py, which runs several of them in turns. Lines on the output are JSON: one per step, and at the end one
with the process's memory.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import AutoTokenizer, TrainerCallback
from worlds import World, data_of

from moslim import PolicyTrainer
from moslim.data.asking import SampledPrompts
from moslim.data.loader import RepeatBatchSampler
from moslim.data.types import Split, View
from moslim.mapping import ExpectedDistance
from moslim.policy.engines import TorchEngine
from moslim.policy.optimizers import RLOO
from moslim.trainer import MoslimTrainer

RATE, KL = 1e-6, 0.05
Report = Callable[..., None]


def wait() -> float:
    """Waits for the word to go, and returns the time."""
    if not sys.stdin.readline():
        os._exit(0)  # the parent has gone or has seen enough
    return time.perf_counter()


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
    from moslim.policy.engines import Decoding
    from moslim.policy.off_policy import OffPolicy
    from moslim.policy.passes import Passes

    options = {
        "engine": TorchEngine(world.new_tokens, decoding=Decoding(**settings.get("decoding", {}))),
        "passes": Passes(**settings.get("passes", {})),
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
        RLOO(kl_coef=KL),
        samples_per_prompt=world.samples,
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


def trl(world: World, folder: Path, steps: int, report: Report, settings: dict[str, Any]) -> None:
    """TRL's RLOOTrainer with the same prompts."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")

    class Steps(TrainerCallback):
        start, cpu = 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start, self.cpu = wait(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            report(seconds=seconds, cpu=cpu, phases={}, length=length)

    parts = settings.pop("parts", 1)
    rows = world.prompts * world.samples
    config = RLOOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=world.samples,
        max_completion_length=world.new_tokens,
        beta=KL,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
        **settings,
    )
    trainer = RLOOTrainer(
        str(folder / "policy"),
        str(folder / "single"),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in asked(world, folder, steps)]),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()


def peak_kib() -> int:
    """Most memory that was resident; the operating system's usual count begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def asked(world: World, folder: Path, steps: int) -> list[list[dict[str, str]]]:
    """The prompts of our run, in its order, as chats.

    Raises:
        ValueError: TRL would make other tokens of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    data = data_of(world)
    renderer = data.renderer(tokenizer)
    rows = data.rows(View.POLICY, Split.TRAIN)
    prompts = SampledPrompts(rows, data.preferences, data.sampler, data.source, data.seed)
    order = RepeatBatchSampler(len(rows), data.batch_size, data.seed)
    chats = []
    for prompt in (prompts[draw] for batch in islice(order, steps) for draw in batch):
        chats.append(renderer.messages(prompt.question, prompt.preference))
        theirs = tokenizer.apply_chat_template(chats[-1], add_generation_prompt=True)["input_ids"]
        if theirs != renderer.ids(prompt.question, prompt.preference):
            raise ValueError(f"the trainers would be given different tokens for {chats[-1]}")
    return chats


def main() -> None:
    specification = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def report(**values: Any) -> None:
        print(json.dumps(values), file=output, flush=True)

    world, folder = World(**specification["world"]), Path(specification["folder"])
    steps, settings = specification["steps"], specification["settings"]
    if specification["racer"] == "trl":
        trl(world, folder, steps, report, settings)
    else:
        {"ours": ours, "earlier": earlier}[specification["racer"]](world, folder, steps, [Turns(report)], settings)
    report(peak_mb=peak_kib() / 1024)


if __name__ == "__main__":
    main()
