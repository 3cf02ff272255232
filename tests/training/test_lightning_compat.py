"""Each private interface in moslim.training.lightning_compat still exists and does what its docstring says."""

import signal
from typing import Any

import pytest
import torch
from jsonargparse import _actions, _typehints
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import nn
from torch.utils.data import DataLoader

from moslim.training import lightning_compat as compat

BATCHES = 5


def expect(condition: bool, interface: str) -> None:
    """Fails with the interface that is gone or has changed."""
    assert condition, f"{interface} is gone or has changed: mend its user in src/moslim/training/lightning_compat.py"


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> bool:
        return compat.at_last_prediction(self.trainer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Weighted:
    def __init__(self, b: float | int = 0) -> None:
        self.b = b


class Counts(Callback):
    """Notes started and finished batches, and started and finished epochs, within and after each batch."""

    def __init__(self) -> None:
        self.within: list[tuple[int, ...]] = []
        self.after: list[tuple[int, ...]] = []

    def read(self, trainer: Trainer) -> tuple[int, ...]:
        numbers = compat.started_batches, compat.finished_batches, compat.started_epochs, compat.finished_epochs
        return tuple(number(trainer) for number in numbers)

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        self.within.append(self.read(trainer))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.after.append(self.read(trainer))


def loader() -> DataLoader:
    return DataLoader(torch.ones(BATCHES, 1))


def make_trainer(tmp_path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saver = {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **saver, **options)


def test_a_module_knows_its_trainer(tmp_path):
    module = Tiny()
    expect(hasattr(module, "_trainer"), "Lightning's LightningModule._trainer")
    assert compat.attached_trainer(module) is None
    trainer = module.trainer = make_trainer(tmp_path)
    expect(compat.attached_trainer(module) is trainer, "Lightning's LightningModule._trainer")


@pytest.mark.parametrize(
    ("place", "interface"),
    [
        (0, "Lightning's fit_loop.epoch_loop.batch_progress.current.ready"),
        (1, "Lightning's fit_loop.epoch_loop.batch_progress.current.processed"),
        (2, "Lightning's fit_loop.epoch_progress.current.ready"),
        (3, "Lightning's fit_loop.epoch_progress.current.processed"),
    ],
)
def test_progress_of_a_fit(tmp_path, place, interface):
    counts = Counts()
    make_trainer(tmp_path, counts, max_epochs=2, limit_train_batches=2).fit(Tiny(), loader())
    within = [(1, 0, 1, 0), (2, 1, 1, 0), (1, 0, 2, 1), (2, 1, 2, 1)]
    after = [(1, 1, 1, 0), (2, 2, 1, 0), (1, 1, 2, 1), (2, 2, 2, 1)]
    expect([found[place] for found in counts.within] == [wanted[place] for wanted in within], interface)
    expect([found[place] for found in counts.after] == [wanted[place] for wanted in after], interface)


def test_the_last_prediction_is_known(tmp_path):
    found = make_trainer(tmp_path).predict(Tiny(), loader())
    expect(found == [False] * (BATCHES - 1) + [True], "Lightning's predict_loop.batch_progress.is_last_batch")


def test_a_finished_epoch_is_not_continued(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=BATCHES)
    trainer.fit(Tiny(), loader())
    interface = "Lightning's _Loop.restarting, a property with a setter,"
    expect(isinstance(vars(_Loop).get("restarting"), property), interface)
    trainer.fit_loop.restarting = True
    expect(trainer.fit_loop.restarting, f"{interface} which _FitLoop overrides for runs with max_steps,")
    trainer.fit_loop.restarting = False
    expect(trainer.fit_loop.restarting, "Lightning's _FitLoop.restarting, which keeps True in runs with max_steps,")
    compat.close_finished_epoch(trainer)
    expect(not trainer.fit_loop.restarting, interface)


@pytest.mark.parametrize("first", [2, BATCHES + 2])
def test_an_epoch_that_is_cut_short_stays_open(tmp_path, first):
    class Saved(Tiny):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            compat.keep_epoch_open(self.trainer, checkpoint)

    shorter = make_trainer(tmp_path, max_steps=first)
    shorter.fit(Saved(), loader())
    shorter.save_checkpoint(tmp_path / "last.ckpt")
    counts = Counts()
    longer = make_trainer(tmp_path, counts, max_steps=2 * BATCHES)
    longer.fit(Saved(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    wanted = [(number % BATCHES + 1, number // BATCHES + 1) for number in range(first, 2 * BATCHES)]
    found = [(started, epochs) for started, _, epochs, _ in counts.within]
    expect(found == wanted, 'The layout of a Lightning checkpoint\'s entry "loops"')
    expect(longer.fit_loop.epoch_loop._batches_that_stepped == 2 * BATCHES, 'The entry "_batches_that_stepped"')


def test_an_epochs_entries_in_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(Tiny(), loader())
    state = trainer._checkpoint_connector.dump_checkpoint()["loops"]["fit_loop"]
    for name in ("epoch_loop.batch_progress", "epoch_progress", "epoch_loop.state_dict"):
        expect(name in state, f'The entry "{name}" of a Lightning checkpoint')
    entry = "_batches_that_stepped"
    expect(entry in state["epoch_loop.state_dict"], f'The entry "{entry}" of a Lightning checkpoint')


def test_sigterm_only_sets_a_flag(tmp_path):
    name = "_sigterm_notifier_fn"
    expect(hasattr(_SignalConnector, name), f"Lightning's _SignalConnector.{name}")
    trainer = make_trainer(tmp_path)
    compat.install_connectors(trainer, compat.DeferredSigterm(trainer), compat.CheckpointConnector(trainer))
    connector = trainer._signal_connector
    before = signal.getsignal(signal.SIGTERM)
    connector.register_signal_handlers()
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        connector.teardown()
    expect(signal.getsignal(signal.SIGTERM) is before, "Lightning's _SignalConnector.teardown")
    expect(trainer.received_sigterm, f"Lightning's _SignalConnector.{name}, called at SIGTERM,")


def test_the_checkpoint_that_is_loaded_is_known(tmp_path):
    for method in ("resume_start", "restore_model", "dump_checkpoint"):
        expect(hasattr(_CheckpointConnector, method), f"Lightning's _CheckpointConnector.{method}")
    places = []

    class Noted(compat.CheckpointConnector):
        def restore_model(self) -> None:
            places.append(self.loading_path)
            super().restore_model()

    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(Tiny(), loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = make_trainer(tmp_path)
    compat.install_connectors(other, compat.DeferredSigterm(other), Noted(other))
    other.predict(Tiny(), loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    expect(places == [str(tmp_path / "one.ckpt")], "Lightning's _CheckpointConnector._ckpt_path")


def test_connectors_are_those_that_the_trainer_uses(tmp_path):
    trainer = make_trainer(tmp_path)
    for name, kind in (("_signal_connector", _SignalConnector), ("_checkpoint_connector", _CheckpointConnector)):
        expect(isinstance(getattr(trainer, name, None), kind), f"Lightning's Trainer.{name}")
    signals, checkpoints = compat.DeferredSigterm(trainer), compat.CheckpointConnector(trainer)
    signals.received_sigterm = True
    compat.install_connectors(trainer, signals, checkpoints)
    expect(trainer.received_sigterm, "Lightning's Trainer._signal_connector")
    checkpoints.dump_checkpoint = lambda weights_only=None: {"mark": 1}
    trainer.strategy.connect(Tiny())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    expect(saved == {"mark": 1}, "Lightning's Trainer._checkpoint_connector")


def test_a_checkpoint_can_be_skipped(tmp_path):
    class Second(compat.OpenModelCheckpoint):
        def skips(self, trainer: Trainer) -> bool:
            return super().skips(trainer) or trainer.global_step != 2

    saver = Second(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(tmp_path, saver, max_steps=3).fit(Tiny(), loader())
    found = [path.name for path in tmp_path.glob("*.ckpt")]
    expect(found == ["step=2.ckpt"], "Lightning's ModelCheckpoint._should_skip_saving_checkpoint")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_checkpoint_at_an_exception_can_be_left_out(tmp_path, wanted):
    class Fails(Tiny):
        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            if batch_idx == 2:
                raise RuntimeError("planned")

    class Saver(compat.OpenModelCheckpoint):
        def saves_on_exception(self, trainer: Trainer) -> bool:
            return super().saves_on_exception(trainer) and wanted

    saver = Saver(tmp_path, save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="planned"):
        make_trainer(tmp_path, saver).fit(Fails(), loader())
    expect(any(tmp_path.glob("*.ckpt")) is wanted, "Lightning's ModelCheckpoint._should_save_on_exception")


@pytest.mark.parametrize("wanted", [True, False])
def test_the_end_of_a_training_is_saved(tmp_path, wanted):
    class Saver(compat.OpenModelCheckpoint):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if wanted:
                self.forget_older(trainer)
            super().on_train_end(trainer, pl_module)

    saver = Saver(tmp_path, save_last=True, every_n_train_steps=2, save_on_train_epoch_end=False)
    make_trainer(tmp_path, saver, max_steps=3).fit(Tiny(), loader())
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    interface = "Lightning's ModelCheckpoint._last_checkpoint_saved or _last_global_step_saved"
    expect(step == (3 if wanted else 2), f"{interface}, which decide about last.ckpt at the end,")


def test_the_steps_of_a_command_line(tmp_path, monkeypatch):
    for name in (
        "_get",
        "_dump_config",
        "_run_subcommand",
        "_prepare_subcommand_kwargs",
        "_instantiate_trainer",
        "_parse_ckpt_path",
        "_prepare_subcommand_parser",
    ):
        expect(name in vars(LightningCLI), f"Lightning's LightningCLI.{name}")
    steps = []

    class Line(compat.OpenCLI):
        def before_instantiate_classes(self) -> None:
            self.fill_config_dump()
            steps.append(self.option(self.config, "trainer").max_steps)
            steps.append(self.option(self.config, "absent", "default"))
            steps.append(self.config_dump["trainer"]["max_steps"])

        def build_trainer(self, config, callbacks):
            steps.append("build")
            return super().build_trainer(config, callbacks)

        def run_subcommand(self, subcommand):
            steps.append(f"run {subcommand}")
            super().run_subcommand(subcommand)

        def subcommand_arguments(self, subcommand):
            steps.append(f"arguments of {subcommand}")
            return {**super().subcommand_arguments(subcommand), "train_dataloaders": loader()}

    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    line = Line(
        Tiny,
        trainer_defaults=quiet,
        save_config_callback=None,
        args=["fit", "--trainer.max_steps", "1"],
        auto_configure_optimizers=False,
    )
    wanted = [1, "default", 1, "build", "run fit", "arguments of fit"]
    expect(steps == wanted, "Lightning's LightningCLI, its private steps or their order,")
    assert line.trainer.global_step == 1


def test_a_command_that_may_not_run_gets_no_options():
    class Line(compat.OpenCLI):
        def may_run(self, subcommand):
            return subcommand == "test"

        def run_subcommand(self, subcommand):
            pass

    line = Line(Tiny, save_config_callback=None, args=["test"], auto_configure_optimizers=False)
    parsers = line._subcommand_parsers
    has = {name: "--trainer.max_steps" in compat.option_names(parser) for name, parser in parsers.items()}
    wanted = {"fit": False, "validate": False, "test": True, "predict": False}
    expect(has == wanted, "Lightning's LightningCLI._prepare_subcommand_parser")


def test_a_checkpoint_does_not_change_the_options(tmp_path):
    class Sized(Tiny):
        def __init__(self, size: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(Sized(3))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    args = ["test", "--model.size", "1", "--ckpt_path", str(tmp_path / "one.ckpt")]

    def size(kind: type) -> int:
        class Line(kind):
            def _run_subcommand(self, subcommand):
                pass

        return Line(Sized, save_config_callback=None, args=args, auto_configure_optimizers=False).model.hparams.size

    expect(size(compat.OpenCLI) == 1, "Lightning's LightningCLI._parse_ckpt_path")


def test_the_options_of_a_parser():
    parser = LightningArgumentParser()
    parser.add_argument("--a.b", type=int)
    expect("--a.b" in compat.option_names(parser), "argparse's ArgumentParser._actions under jsonargparse")


def test_what_comes_before_an_option(monkeypatch):
    for kind in (_typehints.ActionTypeHint, _actions._ActionConfigLoad):
        monkeypatch.setattr(kind, "__call__", getattr(kind.__call__, "applies", kind.__call__))
    told: list[tuple[Any, ...]] = []
    compat.before_options(lambda parser, config, value, option: told.append((config.get("a.b"), value, option)))
    parser = LightningArgumentParser()
    parser.add_class_arguments(Weighted, "a")
    parser.parse_args(["--a.b", "1", "--a.b=2", "--a", "{b: 3}"])
    wanted = [(0, "1", "--a.b"), (1, "2", "--a.b"), (2, "{b: 3}", "--a")]
    expect(told == wanted, "__call__ of jsonargparse's _typehints.ActionTypeHint or _actions._ActionConfigLoad")


def test_the_type_of_an_option():
    parser = LightningArgumentParser()
    parser.add_argument("--a.b", type=float | int)
    assert isinstance(parser.parse_args(["--a.b", "1"]).a.b, float)
    compat.set_option_type(parser, "a.b", int | float)
    expect(isinstance(parser.parse_args(["--a.b", "1"]).a.b, int), "jsonargparse's _typehint of a parser's option")


@pytest.mark.slow
def test_a_wandb_logger_takes_a_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    for name in ("_id", "_wandb_init"):
        expect(hasattr(logger, name), f"Lightning's WandbLogger.{name}")
    compat.set_wandb_run(logger, "abc123")
    try:
        expect(logger.version == "abc123", "Lightning's WandbLogger._id")
        expect(logger.experiment.id == "abc123", "Lightning's WandbLogger._wandb_init")
    finally:
        wandb.finish()
