"""What benchmarks/truthfulqa.py compares the classifier's training speed with: transformers' Trainer, used plainly."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


class Clock(Callback):
    """Counts the ``seconds`` of a Lightning run from its first batch on, as ``train_runtime`` does of the other."""

    seconds = 0.0

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start


def seconds_per_row(
    backbone: str, rows: list[dict[str, Any]], heads: tuple[str, ...], batch_size: int, steps: int
) -> float:
    """Trains two sigmoid outputs for some steps: tokenised beforehand, batches in random order padded to their longest.

    Args:
        backbone: Folder of the encoder.
        rows: Rows with ``question``, ``answer`` and a 0 or 1 per head.
        heads: Names of the labels.
        batch_size: Rows of a batch.
        steps: Steps to take.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=len(heads), problem_type="multi_label_classification"
    )
    encoded = [
        {
            **tokenizer(row["question"], row["answer"], truncation=True, max_length=128),
            "labels": [float(row[head]) for head in heads],
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, options, DataCollatorWithPadding(tokenizer), train_dataset=encoded)
        return trainer.train().metrics["train_runtime"] / (steps * batch_size)
