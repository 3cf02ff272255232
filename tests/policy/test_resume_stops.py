"""Checkpoints of runs that are stopped at bad moments: within an accumulation, and while one is being written."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from moslim.callbacks.dashboards import best_checkpoint
from moslim.callbacks.monitors import StepCheckpoint
from tests.helpers.policy_runs import data, make, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed.*"),
]

SUMMED = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "max_steps": 4}


def test_a_stop_within_an_accumulation_goes_back_to_the_step_before_it(preferences, lm, classifier, tmp_path):
    """Checkpoints are due after every batch, at a validation, after a resumption and at the exception."""

    def fit(stop_at=None, ckpt_path=None, **options):
        module = make(preferences, lm, classifier, num_iterations=2)
        module.stop_at, module.stop = stop_at, RuntimeError("stop")
        every = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_exception": True}
        savers = [
            StepCheckpoint(tmp_path, "a{step}", **every),
            StepCheckpoint(tmp_path, "b{step}", every_n_epochs=1, save_top_k=-1),
        ]
        run = trainer(tmp_path, **{**SUMMED, **options}, callbacks=savers)
        run.fit(module, data(preferences), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = fit()
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    validated = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    for stop_at, done in (
        ((0, 3), 2),
        ((0, 5), 4),
    ):  # each within an accumulation, the second one soon after a resumption
        newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
        with pytest.raises(RuntimeError, match="stop"):
            fit(stop_at, newest, **validated)
        for path in tmp_path.glob("*.ckpt"):
            loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
            assert loop["epoch_loop.batch_progress"]["current"]["processed"] % 2 == 0, path
        assert list(tmp_path.glob(f"a*{done // 2}*.ckpt")) and list(tmp_path.glob("b*.ckpt"))
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = fit(None, newest)
    assert len(resumed.trace) == 4
    assert [step["loss"] for step in resumed.trace] == [step["loss"] for step in whole.trace[4:]]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


class Interrupted(torch.optim.SGD):
    """Is stopped in the middle of its second step, or just after it."""

    def __init__(self, parameters, after):
        super().__init__(parameters, lr=0.1)
        self.after, self.steps = after, 0

    def step(self, closure=None):
        self.steps += 1
        stopped = self.steps == 2
        if stopped and not self.after:
            closure()
            raise KeyboardInterrupt
        loss = super().step(closure)
        if stopped:
            raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize("after", [False, True])
def test_weights_are_not_saved_while_they_change(after, preferences, lm, classifier, tmp_path):
    save = StepCheckpoint(tmp_path, every_n_train_steps=100, save_on_exception=True)
    module = make(preferences, lm, classifier, optimizer=lambda parameters: Interrupted(parameters, after))
    run = trainer(tmp_path, max_steps=3, callbacks=[save], enable_checkpointing=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(module, data(preferences))
    assert not [*tmp_path.glob("*.ckpt")]


@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 3, "check_val_every_n_epoch": None}])
def test_the_last_checkpoint_is_the_end_of_the_training(validation, preferences, lm, classifier, tmp_path):
    validation = {**validation, "limit_val_batches": len(validation)}

    def fit(max_steps, ckpt_path=None):
        saver = StepCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
        options = {"logger": CSVLogger(tmp_path, name="log"), "log_every_n_steps": 1, "enable_checkpointing": True}
        run = trainer(tmp_path, max_steps=max_steps, callbacks=[saver], **options, **validation)
        module = make(preferences, lm, classifier)
        run.fit(module, data(preferences), ckpt_path=ckpt_path, weights_only=True)
        with open(tmp_path / f"log/version_{run.logger.version}/metrics.csv", newline="") as file:
            return module, saver, [row["step"] for row in csv.DictReader(file) if row["train/loss"]]

    whole, saver, steps = fit(5)
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 5
    assert best_checkpoint(saver) == saver.last_model_path != saver.best_model_path
    saver.monitor = "train/reward"
    assert best_checkpoint(saver) == saver.best_model_path
    assert best_checkpoint(None) == ""
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    _, saver, first = fit(3)
    resumed, _, rest = fit(5, saver.last_model_path)
    assert (first, rest) == (steps[:3], steps[3:]) == (["0", "1", "2"], ["3", "4"])
    assert [step["loss"] for step in resumed.trace] == [step["loss"] for step in whole.trace[3:]]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
