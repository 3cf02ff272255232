"""Accumulated batches make the step of the whole batch, in double precision, in one process and in two."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from moslim.data.data_module import PreferenceDataModule
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.reward.losses import BradleyTerry, Corn, CrossEntropy, Regression, SoftOrdinal
from moslim.reward.reward_classifier import RewardClassifier
from moslim.utils.errors import UsageError
from tests.helpers.word_task import ComparedSource, save_backbone

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
PREFERENCES = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})
ROWS = 72
WEIGHTED = CrossEntropy(class_weights=[[1.0, 3.0], [0.5, 2.0, 1.0]], label_smoothing=0.1)
PARTS = {
    "supervised": lambda start: SupervisedTrainer(start, **sgd()),
    "corn": lambda start: classifier(start, Corn()),
    "weighted": lambda start: classifier(start, WEIGHTED),
    "soft ordinal": lambda start: classifier(start, SoftOrdinal([2.0, 1.0])),
    "regression": lambda start: classifier(start, Regression()),
    "frozen": lambda start: classifier(start, Corn(), freeze_backbone=True, cache_features=False),
    "cached features": lambda start: classifier(start, Corn(), freeze_backbone=True),
}


def sgd(schedule=None):
    """Plain gradient descent at rate 1: a step is its gradient."""
    scheduler = None if schedule is None else lambda optimizer: LambdaLR(optimizer, schedule)
    return {"optimizer": lambda parameters: SGD(parameters, lr=1.0), "lr_scheduler": scheduler}


def classifier(start, loss, **options):
    torch.manual_seed(0)
    pairs = BradleyTerry(scale=2.0, weight=0.5)
    return RewardClassifier(PREFERENCES, start, loss=loss, pairs=pairs, calibrate=False, **{**sgd(), **options})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_backbone(folder, seed=0, dropout=0.0)
    return str(folder)


class Keep(Callback):
    """Saves weights and what was logged at the end."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            weights = {name: p.detach().clone() for name, p in module.named_parameters()}
            torch.save((weights, {k: float(v) for k, v in trainer.callback_metrics.items()}), self.path)


def fitted(folder, module, batch_size, several, **options):
    """Weights and logged numbers after training on :class:`ComparedSource`, whose rows lack labels by turns."""
    settings = {"batch_size": batch_size, "token_budget": options.pop("token_budget", None)}
    settings["workers"] = options.pop("workers", 0)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain |= {"enable_checkpointing": False, "limit_val_batches": 0, "use_distributed_sampler": False}
    Trainer(
        default_root_dir=folder,
        accumulate_grad_batches=several,
        precision="64-true",
        log_every_n_steps=1,
        callbacks=[Keep(folder / "kept.pt")],
        **{**plain, "max_epochs": 1, **options},
    ).fit(module, PreferenceDataModule(PREFERENCES, ComparedSource(labelled=True), **settings))
    return torch.load(folder / "kept.pt")


def assert_same(found, expected, start):
    weights, logged = found
    moved = 0.0
    for name, value in expected[0].items():
        torch.testing.assert_close(weights[name], value, atol=1e-12, rtol=1e-12)
        moved += (value - start[name]).abs().sum().item()
    assert moved > 0.1
    assert {k: v for k, v in logged.items() if "loss" in k or "accuracy" in k} == pytest.approx(
        {k: v for k, v in expected[1].items() if "loss" in k or "accuracy" in k}, rel=1e-5
    )


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """By kind: the start, and weights and logged numbers after one step on all rows at once."""
    made = {}

    def of(kind):
        if kind not in made:
            module = PARTS[kind](start)
            before = {name: p.detach().double() for name, p in module.named_parameters()}
            made[kind] = before, fitted(tmp_path_factory.mktemp("whole"), module, ROWS, 1)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", PARTS)
def test_four_batches_are_one(kind, start, whole, tmp_path):
    before, expected = whole(kind)
    assert_same(fitted(tmp_path, PARTS[kind](start), ROWS // 4, 4), expected, before)


@pytest.mark.parametrize("kind", ["supervised", "corn"])
def test_batches_of_a_budget_in_a_window_that_the_epoch_cuts_short_are_one(kind, start, whole, tmp_path):
    """Batches of different numbers of rows, fewer than are accumulated."""
    before, expected = whole(kind)
    assert_same(fitted(tmp_path, PARTS[kind](start), 1, 64, token_budget=60), expected, before)


@pytest.mark.parametrize("kind", ["supervised", "weighted"])
@pytest.mark.parametrize("several", [1, 3])
def test_two_processes_are_one(kind, several, start, whole, tmp_path):
    before, expected = whole(kind)
    two = {"strategy": "ddp_fork", "devices": 2}
    assert_same(fitted(tmp_path, PARTS[kind](start), ROWS // 2 // several, several, **two), expected, before)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_window_of_an_epoch_is_a_full_step(workers, start, tmp_path):
    """Four batches, three at a time: the second step is that of the fourth batch alone."""

    def change(rates, several, **options):
        module = SupervisedTrainer(start, **sgd(lambda step: rates[min(step, len(rates) - 1)]))
        return fitted(tmp_path / str(several), module, ROWS // 4, several, workers=workers, **options)[0]

    alone = change([0.0, 0.0, 0.0, 1.0], 1)
    for name, value in change([0.0, 1.0], 3).items():
        torch.testing.assert_close(value, alone[name], atol=1e-12, rtol=1e-12)
    cut = change([0.0, 1.0], 2, limit_train_batches=3)
    third = change([0.0, 0.0, 1.0], 1, limit_train_batches=3)
    for name, value in cut.items():
        torch.testing.assert_close(value, third[name], atol=1e-12, rtol=1e-12)


def test_a_run_goes_on_between_windows_and_not_within_one(start, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    def run(several, **options):
        trainer = Trainer(
            default_root_dir=tmp_path,
            accumulate_grad_batches=several,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            max_epochs=1,
            accelerator="cpu",
            use_distributed_sampler=False,
            callbacks=options.pop("callbacks", []),
        )
        data = PreferenceDataModule(PREFERENCES, ComparedSource(labelled=True), batch_size=ROWS // 4)
        module = PARTS["supervised"](start)
        trainer.fit(module, data, weights_only=True, **options)
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    whole = run(2, callbacks=[Save()])
    with pytest.raises(UsageError, match=r"after batch 1 of an epoch, within the 2 batches .* that divides 1"):
        run(2, ckpt_path=tmp_path / "0.ckpt")
    again = run(2, ckpt_path=tmp_path / "1.ckpt")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_loader_that_cannot_look_ahead_is_refused(start, tmp_path):
    rows = PreferenceDataModule(PREFERENCES, ComparedSource(labelled=True), batch_size=9)
    module = PARTS["supervised"](start)
    rows.trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    rows.trainer.strategy.connect(module)
    batches = list(rows.train_dataloader())
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    run = Trainer(default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=2, **options)
    with pytest.raises(UsageError, match=r"accumulate_grad_batches is 2.*DataLoader.*PreferenceDataModule"):
        run.fit(module, DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("kind", ["supervised", "weighted", "corn"])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(kind, start, tmp_path):
    def tested(size, **options):
        module = PARTS[kind](start)
        plain = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "precision": "64-true"}
        run = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, use_distributed_sampler=False, **plain)
        data = PreferenceDataModule(PREFERENCES, ComparedSource(labelled=True), eval_batch_size=size)
        return run.validate(module, data, verbose=False)[0]["val/loss"]

    assert tested(5) == pytest.approx(tested(100), rel=1e-6)
