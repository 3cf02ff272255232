"""Each trap of LightningCLI that the command line closes has a test here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from moslim.cli import SUBCOMMANDS, _keep_whole_numbers, main, run
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError
from tests.helpers.cli_folder import PARTS, folder  # noqa: F401  # a working folder for each test
from tests.helpers.cli_parts import ByKeyword, Model, Plain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def fit(*options, config="config.yaml"):
    return run(["fit", "--config", str(config), *options])


def refused(capsys, *args):
    """Runs a command that must end with exit code 2, and returns what it says."""
    with pytest.raises(SystemExit) as stop:
        run(list(args))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) < 25, "the error drowns in the usage"
    return said


# --- preferences and seed, given once


def test_preferences_reach_model_and_data():
    cli = fit("--preferences.dimensions.warmth", "[icy, cool, hot]")
    expected = PreferenceSet({"warmth": ["icy", "cool", "hot"], "length": ["short", "middling", "long"]})
    assert cli.model.preferences == cli.datamodule.preferences == expected


def test_a_later_file_replaces_the_dimensions():
    Path("other.yaml").write_text("preferences: {dimensions: {tone: [low, high]}}")
    assert fit("--config", "other.yaml").model.preferences.names == ("tone",)


def test_preferences_from_a_file_of_their_own():
    Path("tone.yaml").write_text("dimensions: {tone: [low, high]}")
    Path("more.yaml").write_text("preferences: tone.yaml")
    assert fit("--config", "more.yaml").model.preferences.names == ("tone",)
    Path("tone.yaml").unlink()
    assert fit(config="outputs/version_0/config.yaml").model.preferences.names == ("tone",)
    assert "__path__" not in str(torch.load("outputs/version_0/checkpoints/last.ckpt")["hyper_parameters"])


def test_the_seed_reaches_model_and_data():
    cli = fit("--seed_everything", "5")
    assert cli.model.seed == cli.datamodule.seed == torch.initial_seed() == 5


def test_a_model_without_preferences_and_seed():
    assert type(fit("--model", f"{PARTS}.Plain").model) is Plain


def test_checkpoints_hold_plain_data_only():
    fit()
    checkpoint = torch.load("outputs/version_0/checkpoints/last.ckpt", weights_only=True)
    dimensions = {"warmth": ["cold", "warm"], "length": ["short", "middling", "long"]}
    assert checkpoint["hyper_parameters"]["preferences"]["init_args"] == {"dimensions": dimensions}


def test_load_from_checkpoint_builds_the_class_that_is_named():
    fit("--model.scale", "3")
    model = Model.load_from_checkpoint("outputs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (model.scale, model.preferences.names) == (3.0, ("warmth", "length"))


# --- configs


def test_a_saved_config_replays_bit_for_bit():
    first = fit("--model.scale", "2.5", "--seed_everything", "3")
    second = fit(config="outputs/version_0/config.yaml")
    assert torch.equal(first.model.layer.weight, second.model.layer.weight)
    assert Path("outputs/version_0/config.yaml").read_text() == Path("outputs/version_1/config.yaml").read_text()


def test_a_saved_fit_config_serves_every_command():
    fit()
    for command in set(SUBCOMMANDS) - {"fit", "replay"}:  # replay is for policies
        extra = {"generate": ["--question", "Why?"], "export": ["--out", "model.pt"]}.get(command, [])
        run([command, "--config", "outputs/version_0/config.yaml", "--ckpt_path", "last", *extra])
    assert Path("model.pt").exists()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model.scal", "3", "scal"),
        ("--model.squash.gian", "3", "gian"),
        ("--data.row", "3", "row"),
        ("--trainer.max_epoch", "3", "max_epoch"),
        ("--checkpoint.top_k", "3", "top_k"),
        ("--preferences.dimension.tone", "[a, b]", "dimension"),
        ("--optimizer", "SGD", "optimizer"),
        ("--nonsense", "3", "nonsense"),
    ],
)
def test_misspelt_options_are_named(capsys, option, value, named):
    given = ["--model.squash", f"{PARTS}.Squash"] if "squash" in option else []
    assert named in refused(capsys, "fit", "--config", "config.yaml", *given, option, value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {init_args: {scal: 3}}", "scal"),
        ("model: {init_args: {squash: {class_path: tests.helpers.cli_parts.Squash, init_args: {gian: 1}}}}", "gian"),
        ("trainer: {max_epoch: 3}", "max_epoch"),
        ("preferences: {dimension: {a: [b, c]}}", "dimension"),
        ("modle: {init_args: {scale: 3}}", "modle"),
    ],
)
def test_misspelt_keys_are_named(capsys, text, named):
    Path("more.yaml").write_text(text)
    assert named in refused(capsys, "fit", "--config", "config.yaml", "--config", "more.yaml")


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_and_print_config(capsys, command):
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert stop.value.code == 0 and "--preferences" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run([command, "--config", "config.yaml", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == f"{PARTS}.Model"


def test_a_default_that_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match=r"model.init_args.squash` cannot be written"):
        fit("--model", f"{PARTS}.Positional")


def test_a_default_by_keyword_replays():
    fit("--model", f"{PARTS}.ByKeyword")
    again = fit(config="outputs/version_0/config.yaml").model
    assert type(again) is ByKeyword and again.squash.gain == 2.0


# --- the user's own classes


def test_classes_from_the_working_folder():
    Path("my_lab.py").write_text(
        "from tests.helpers import cli_parts\nclass Mine(cli_parts.Model): pass\nclass Half(cli_parts.Squash): pass\n"
    )
    cli = fit("--model", "my_lab.Mine", "--model.squash", "my_lab.Half", "--model.squash.gain", "4")
    assert (type(cli.model).__name__, type(cli.model.squash).__name__, cli.model.squash.gain) == ("Mine", "Half", 4.0)


def test_two_classes_of_one_name_need_the_full_path(capsys):
    for lab in ("lab_one", "lab_two"):
        Path(f"{lab}.py").write_text("from tests.helpers import cli_parts\nclass Twin(cli_parts.Squash): pass\n")
        fit("--model.squash", f"{lab}.Twin")
    said = refused(capsys, "fit", "--config", "config.yaml", "--model.squash", "Twin")
    assert "lab_one.Twin" in said and "lab_two.Twin" in said
    assert type(fit("--model.squash", "lab_two.Twin").model.squash).__module__ == "lab_two"


def test_an_error_in_a_constructor_is_not_buried():
    with pytest.raises(RuntimeError, match=r"^gain is -1.0: it must not be negative$"):
        fit("--model.squash", f"{PARTS}.Squash", "--model.squash.gain", "-1")
    with pytest.raises(ValueError, match=r"^dimension 'warmth' names a level twice"):
        fit("--preferences.dimensions.warmth", "[a, a]")


def test_a_function_needs_a_return_type(capsys):
    fit("--model.function", f"{PARTS}.double")
    refused(capsys, "fit", "--config", "config.yaml", "--model.function", f"{PARTS}.double_without_types")


def test_another_optimizer_keeps_the_arguments_both_know():
    """jsonargparse's rule, which docs and configs must reckon with: write `weight_decay` out when switching."""
    assert _optimizer("--model.optimizer", "torch.optim.SGD").defaults["weight_decay"] == 0.01
    switched = _optimizer("--model.optimizer", "torch.optim.SGD", "--model.optimizer.weight_decay", "0")
    assert type(switched) is torch.optim.SGD and switched.defaults["weight_decay"] == 0


def _optimizer(*options):
    return fit("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.5", *options).trainer.optimizers[0]


# --- checkpoints


def test_the_command_line_beats_the_checkpoint():
    fit("--model.scale", "2")
    checkpoint = "outputs/version_0/checkpoints/last.ckpt"
    resumed = fit("--model.scale", "9", "--ckpt_path", checkpoint, "--trainer.max_epochs", "2")
    assert (resumed.model.scale, resumed.trainer.global_step) == (9.0, 8)
    other = run(["validate", "--config", "config.yaml", "--model", f"{PARTS}.Plain", "--ckpt_path", checkpoint])
    assert type(other.model) is Plain


def test_last_is_the_newest_over_all_versions():
    first = fit("--trainer.max_epochs", "2")
    second = fit("--trainer.max_epochs", "1")
    run(["validate", "--config", "config.yaml"])  # leaves a version without a checkpoint
    resumed = fit("--ckpt_path", "last", "--trainer.max_epochs", "1")
    assert torch.equal(resumed.model.layer.weight, second.model.layer.weight)
    assert not torch.equal(resumed.model.layer.weight, first.model.layer.weight)
    assert resumed.trainer.log_dir != second.trainer.log_dir


def test_last_in_a_second_process():
    trained = fit().model
    command = [sys.executable, str(ROOT / "main.py"), "export", "--config", "config.yaml"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    subprocess.run(
        [*command, "--ckpt_path", "last", "--out", "model.pt"], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert torch.equal(torch.load("model.pt")["weight"], trained.layer.weight)


@pytest.mark.parametrize("command", ["fit", "test", "export"])
def test_last_without_a_checkpoint_is_an_error(command):
    with pytest.raises(FileNotFoundError, match="no checkpoint under elsewhere"):
        run([command, "--config", "config.yaml", "--trainer.default_root_dir", "elsewhere", "--ckpt_path", "last"])


def test_last_where_the_checkpoints_have_a_folder_of_their_own():
    options = ["--checkpoint.dirpath", "kept", "--checkpoint.every_n_train_steps", "2"]
    fit(*options)
    assert fit(*options, "--ckpt_path", "last", "--trainer.max_epochs", "3").trainer.global_step == 12


def test_without_checkpoints():
    fit("--trainer.enable_checkpointing", "false")
    fit("--trainer.fast_dev_run", "true")
    assert not list(Path().rglob("*.ckpt"))


# --- generate and export


def test_export_restores_weights_and_the_states_of_parts(capsys):
    trained = fit().model
    run(["export", "--config", "config.yaml", "--ckpt_path", "last", "--out", "model.pt", "--model.scale", "7"])
    exported = torch.load("model.pt")
    assert torch.equal(exported["weight"], trained.layer.weight) and exported["seen"] == 4
    assert "exported to model.pt" in capsys.readouterr().out


def test_generate_prints_answers(capsys):
    fit()
    options = ["--question", "Why?", "--levels.warmth", "1", "--samples", "2", "--ckpt_path", "last"]
    run(["generate", "--config", "config.yaml", *options])
    assert capsys.readouterr().out.count("Why? {'warmth': 1} of ('warmth', 'length') after 4") == 2


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        (["export", "--ckpt_path", "last", "--model", f"{PARTS}.Plain"], UsageError, "Plain has no method `export`"),
        (["export", "--ckpt_path", "last", "--form", "adapter"], UsageError, "Model has no method `export_adapter`"),
        (["generate", "--question", "Why?", "--model", f"{PARTS}.Plain"], UsageError, "Plain has no method `answer`"),
        (["replay"], UsageError, "a step of a PolicyTrainer, not of a Model"),
        (["export"], ValueError, "--ckpt_path"),
        (["generate"], ValueError, "--question"),
        (["export", "--ckpt_path", "nowhere.ckpt"], FileNotFoundError, "nowhere.ckpt"),
    ],
)
def test_commands_that_cannot_work_say_why(args, error, said):
    fit()
    with pytest.raises(error, match=said):
        run([args[0], "--config", "config.yaml", *args[1:]])


def test_weights_before_training_are_never_taken_silently():
    fit()
    for command in ("generate", "export"):
        extra = ["--question", "Why?"] if command == "generate" else ["--out", "model.pt"]
        with pytest.raises(UsageError, match="--ckpt_path none"):
            run([command, "--config", "config.yaml", *extra])
        run([command, "--config", "config.yaml", *extra, "--ckpt_path", "none"])
    with pytest.warns(UserWarning, match="no --ckpt_path: test takes the weights that Model starts with"):
        run(["test", "--config", "config.yaml"])
    tested = run(["test", "--config", "config.yaml", "--ckpt_path", "none"])
    assert tested.model.counting.seen == 0


def test_a_script_goes_on_with_the_weights_that_it_has_trained(capsys):
    trained = fit()
    trained.trainer.export(trained.model, trained.datamodule, "model.pt")
    assert torch.load("model.pt")["seen"] == 4 and capsys.readouterr().out.endswith("exported to model.pt\n")
    (answer,) = trained.trainer.generate(trained.model, trained.datamodule, "Why?")
    assert answer.endswith("after 4")
    other = Model(trained.model.preferences)
    with pytest.raises(UsageError, match="generate needs a trained model"):
        trained.trainer.generate(other, trained.datamodule, "Why?")


@pytest.mark.parametrize("command", ["validate", "test", "predict", "generate"])
def test_a_module_of_ours_needs_a_checkpoint_before_it_is_built(command):
    with pytest.raises(UsageError, match=f"{command} needs a trained model"):
        run([command, "--config", "config.yaml", "--model", f"{PARTS}.NeverBuilt"])


def test_levels_are_checked_before_a_model_is_built(capsys):
    fit()
    command = ["generate", "--config", "config.yaml", "--ckpt_path", "last", "--question", "Why?"]
    run([*command, "--levels.warmth", "warm"])
    assert "Why? {'warmth': 'warm'}" in capsys.readouterr().out
    unbuilt = [*command, "--model", f"{PARTS}.NeverBuilt"]
    with pytest.raises(UsageError, match=r"'warmth' has no level 'hot'; lowest first, there are: cold \(0\), warm"):
        run([*unbuilt, "--levels.warmth", "hot"])
    with pytest.raises(UsageError, match="no dimension 'heat'; there are: warmth, length"):
        run([*unbuilt, "--levels.heat", "1"])


def test_a_level_may_be_called_no_or_yes(capsys):
    fit()
    command = ["generate", "--config", "config.yaml", "--ckpt_path", "last", "--question", "Why?"]
    run([*command, "--preferences.dimensions.warmth", "['no', 'yes']", "--levels.warmth", "no"])
    assert "'warmth': 'no'" in capsys.readouterr().out


def test_a_failed_start_leaves_no_folder():
    with pytest.raises(FileNotFoundError):
        fit("--ckpt_path", "nowhere.ckpt", "--trainer.default_root_dir", "deep/outputs")
    with pytest.raises(RuntimeError):
        fit("--data", f"{PARTS}.Failing")
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml"]
    fit()
    with pytest.raises(RuntimeError):
        run(["test", "--config", "config.yaml", "--data", f"{PARTS}.Failing", "--ckpt_path", "last"])
    assert [path.name for path in Path("outputs").iterdir()] == ["version_0"]


# --- loggers


def test_every_run_has_a_folder_of_its_own():
    options = ["--config", str(ROOT / "configs/logger/csv.yaml"), "--trainer.default_root_dir", "outputs/mine"]
    folders = [fit(*options).trainer.log_dir for _ in range(2)]
    assert folders == ["outputs/mine/version_0", "outputs/mine/version_1"]
    assert {path.name for path in Path(folders[1]).iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}


def test_a_second_run_does_not_die_on_an_existing_config():
    for seed in range(2):
        fit("--trainer.logger", "false", "--seed_everything", str(seed))
        assert yaml.safe_load(Path("outputs/config.yaml").read_text())["seed_everything"] == seed


@pytest.fixture
def wandb():
    import wandb

    yield wandb
    wandb.finish()


def test_wandb_is_offline_and_beside_the_csv_logger(wandb):
    for _ in range(2):
        cli = fit("--config", str(ROOT / "configs/logger/wandb.yaml"))
        assert [type(logger) for logger in cli.trainer.loggers] == [CSVLogger, WandbLogger]
        assert wandb.run.offline
        wandb.finish()
    assert Path("outputs/version_1/config.yaml").exists() and Path("outputs/version_1/metrics.csv").exists()
    assert len(list(Path("outputs/wandb").glob("offline-run-*"))) == 2


def test_wandb_asks_for_no_key(wandb, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    fit("--config", str(ROOT / "configs/logger/wandb.yaml"), "--trainer.logger.offline", "false")
    assert wandb.run.offline


def test_the_csv_logger_comes_first_where_it_is_given_last(wandb):
    Path("both.yaml").write_text("""
trainer:
  logger:
    - {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true}}
    - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: here, name: mine}}
""")
    cli = fit("--config", "both.yaml")
    assert [type(logger) for logger in cli.trainer.loggers] == [CSVLogger, WandbLogger]
    assert cli.trainer.log_dir == "here/mine/version_0"
    assert fit("--config", "both.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2").trainer.global_step == 8


# --- the rest


def test_defaults():
    cli = fit()
    assert cli.model.seed == cli.datamodule.seed == 0
    assert cli.config_init.fit.trainer.use_distributed_sampler is False
    assert cli.trainer.checkpoint_callback.save_last is True


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_a_whole_number_of_batches_stays_one_whatever_typing_remembers():
    """``Union[int, float]`` may be an earlier ``Union[float, int]``, for which 1 is 1.0: all batches."""
    parser = LightningArgumentParser()
    names = [f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")]
    for name in (*names, "overfit_batches", "val_check_interval"):
        parser.add_argument(f"--trainer.{name}", type=float | int | None)
    given = [f"--trainer.{name}=1" for name in names]
    assert isinstance(parser.parse_args(given).trainer.limit_train_batches, float)
    _keep_whole_numbers(parser)
    found = parser.parse_args([*given, "--trainer.overfit_batches=0.5", "--trainer.val_check_interval=100"]).trainer
    assert all(type(found[name]) is int for name in (*names, "val_check_interval")) and found.overfit_batches == 0.5


# --- tables of metrics


@pytest.mark.parametrize(("command", "name"), [("validate", "val"), ("test", "test")])
def test_metrics_are_one_table_with_three_decimals(capsys, monkeypatch, command, name):
    monkeypatch.setenv("COLUMNS", "40")
    cli = run([command, "--config", "config.yaml"])
    table = capsys.readouterr().out.rstrip().splitlines()[-4:]
    assert table[0] == f"{command}: metrics"
    assert table[1].split() == ["metric", "value"]
    assert table[3].split() == [name, f"{float(cli.trainer.callback_metrics[name]):.3f}"]


def test_a_table_of_metrics_can_be_left_out(capsys):
    run(["validate", "--config", "config.yaml", "--verbose", "false"])
    assert "metric" not in capsys.readouterr().out
