"""Numbers of a step reach the loggers in one row."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from moslim.training.base_module import RunModule


class Line(RunModule):
    """Records two numbers per batch, in two calls."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.record({"train/batch": batch_idx, "train/double": 0.0})
        self.record({"train/double": torch.tensor(2 * batch_idx)})
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})
        return (self.slope * batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(folder, every, accumulate, batches=7, kind=Line, **options):
    module = kind()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.ones(batches, 1)))
    with open(folder / "metrics.csv", newline="") as file:
        found = [(int(r["step"]), int(float(r["train/batch"])), r["train/double"]) for r in csv.DictReader(file)]
    return found, module


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"),
    [
        (1, 1, [(step, step) for step in range(7)]),
        (3, 1, [(2, 2), (5, 5)]),
        (1, 2, [(0, 1), (1, 3), (2, 5), (3, 6)]),  # the last step has one batch only
        (2, 3, [(1, 5)]),
        (0, 1, []),
    ],
)
def test_a_shown_step_is_one_row(tmp_path, every, accumulate, expected):
    if not expected:
        with pytest.raises(FileNotFoundError):  # nothing was logged, so nothing was written
            rows(tmp_path, every, accumulate)
        return
    found, _ = rows(tmp_path, every, accumulate)
    assert [(step, batch) for step, batch, _ in found] == expected
    assert all(float(double) == 2 * batch for _, batch, double in found)


class Deaf(Line):
    def configure_callbacks(self):
        return []


def test_numbers_that_nothing_would_send_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"Deaf.configure_callbacks .* return \[\*super"):
        rows(tmp_path, 1, 1, kind=Deaf)


def test_recorded_numbers_are_not_rounded_to_the_precision_of_the_run(tmp_path):
    class Half(Line):
        def training_step(self, batch, batch_idx):
            self.record({"train/batch": 257.0, "train/double": 1e6})
            return (self.slope * batch).mean()

    found, module = rows(tmp_path, 1, 1, 1, Half, precision="bf16-true")
    assert found == [(0, 257, "1000000.0")]
    assert float(module.trainer.callback_metrics["train/batch"]) == 257


def test_what_is_recorded_can_be_monitored_at_once(tmp_path):
    _, module = rows(tmp_path, 3, 1)
    assert [seen["train/double"] for seen in module.seen] == [2 * batch for batch in range(7)]
