import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from moslim.callbacks.guards import Gate, GateError


class Logs(LightningModule):
    """Logs ``score``, which is 0.25 in the first epoch and 0.5 in the second, and ``loss``, which is 2."""

    def __init__(self, nan: bool = False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.nan = nan

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, _):
        return (self.weight * batch).sum()

    def validation_step(self, batch, _):
        self.log_dict({"val/score": float("nan") if self.nan else 0.25 * (self.current_epoch + 1), "val/loss": 2.0})


def trainer(gate, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(callbacks=[gate], accelerator="cpu", max_epochs=2, enable_model_summary=False, **(quiet | options))


def fit(gate, model=None, **options):
    rows = DataLoader(torch.ones(2, 1))
    runner = trainer(gate, **options)
    runner.fit(model or Logs(), rows, rows)
    return runner


def test_the_last_value_counts_and_is_shown(capsys):
    fit(Gate({"val/score": 0.5}, {"val/loss": 2.0}))
    shown = capsys.readouterr().out
    assert shown.count("gate passed") == 1
    assert "val/score" in shown and ">= 0.5" in shown and "<= 2" in shown


def test_every_metric_that_falls_short_is_listed():
    with pytest.raises(GateError) as error:
        fit(Gate({"val/score": 0.51}, {"val/loss": 1.5}))
    assert "val/score: 0.5, required >= 0.51" in str(error.value)
    assert "val/loss: 2, required <= 1.5" in str(error.value)


def test_an_unknown_metric_is_named_with_its_neighbours():
    with pytest.raises(GateError, match=r"val/scores: no such metric; did you mean val/score"):
        fit(Gate({"val/scores": 0.1}))


def test_nan_does_not_pass():
    for gate in (Gate({"val/score": -1e9}), Gate({}, {"val/score": 1e9})):
        with pytest.raises(GateError, match="val/score: nan"):
            fit(gate, Logs(nan=True))


def test_validate_is_judged():
    rows = DataLoader(torch.ones(2, 1))
    with pytest.raises(GateError, match=r"val/score: 0\.25"):
        trainer(Gate({"val/score": 0.5})).validate(Logs(), rows, verbose=False)
    trainer(Gate({"val/score": 0.25})).validate(Logs(), rows, verbose=False)


def test_a_trial_run_is_not_judged():
    assert fit(Gate({"val/score": 9.0}), fast_dev_run=True).state.finished


def test_neither_the_sanity_check_nor_an_early_epoch_is_judged():
    assert fit(Gate({"val/score": 0.5}), num_sanity_val_steps=2).current_epoch == 2


def test_thresholds_are_needed():
    with pytest.raises(ValueError, match="at least one threshold"):
        Gate({})
