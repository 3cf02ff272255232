"""One trainer in one process: does a training step when told so on its input, and says on its output what it took.

    python benchmarks/racers.py SPECIFICATION.json

Started by throughput.py, which runs two of them in turns. Lines on the output are JSON: one per step, and at the end
one with the process's memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
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
from moslim.policy.passes import Passes
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

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks["start"], self.marks["cpu"] = wait(), time.process_time()

    def on_before_backward(self, *_: Any) -> None:
        self.marks["backward"] = time.perf_counter()

    def on_after_backward(self, *_: Any) -> None:
        self.marks["optimizer"] = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        end = time.perf_counter()
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        phases = {name.removeprefix("time/"): value for name, value in logged.items() if name.startswith("time/")}
        phases["backward"] = self.marks["optimizer"] - self.marks["backward"]
        phases["optimizer"] = end - self.marks["optimizer"]
        seconds = end - self.marks["start"]
        phases["rest"] = seconds - sum(phases.values())
        cpu = time.process_time() - self.marks["cpu"]
        self.report(seconds=seconds, cpu=cpu, phases=phases, length=logged["train/length"])


def ours(world: World, folder: Path, steps: int, report: Report, settings: dict[str, Any]) -> None:
    """This project's policy stage."""
    module = PolicyTrainer(
        world.preferences,
        str(folder / "policy"),
        str(folder / "classifier"),
        ExpectedDistance(),
        RLOO(kl_coef=KL),
        TorchEngine(max_new_tokens=world.new_tokens),
        samples_per_prompt=world.samples,
        passes=Passes(**settings),
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, fused=True),
    )
    trainer = MoslimTrainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Turns(report)],
    )
    trainer.fit(module, data_of(world))


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

    racer = {"ours": ours, "trl": trl}[specification["racer"]]
    world = World(**specification["world"])
    racer(world, Path(specification["folder"]), specification["steps"], report, specification["settings"])
    report(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
