"""TRL's RLOOTrainer as a racer, see race.py. It imports nothing of this project, so that its memory is its own.

python benchmarks/trl_racer.py SPECIFICATION.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from turn import Report, take_part, wait


def train(specification: dict[str, Any], report: Report) -> None:
    """Trains on the chats of the specification."""
    folder, settings, chats = Path(specification["folder"]), specification["settings"], specification["chats"]
    world, rate, kl = specification["world"], specification["rate"], specification["kl"]
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
    rows = world["prompts"] * world["samples"]
    config = RLOOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=world["samples"],
        max_completion_length=world["new_tokens"],
        beta=kl,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_steps=specification["steps"],
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
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in chats]),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()


if __name__ == "__main__":
    take_part(train)
