"""A run on the command line with everything on, read back from what it wrote."""

import csv
import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from moslim.callbacks.dashboards import METRICS, STEP
from moslim.cli import run
from tests.helpers.offline_board import summaries
from tests.helpers.offline_wandb import read
from tests.helpers.tiny_world import FEW_STEPS, ONE_EACH, SMALL_POLICY, save_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:guard `truncated`"),  # answers of six tokens
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"
FIT = f"""fit --config {ROOT}/configs/quickstart/policy.yaml --config {ROOT}/configs/logger/wandb.yaml
    {FEW_STEPS} {SMALL_POLICY} {ONE_EACH} --trainer.enable_progress_bar true --trainer.log_every_n_steps 1
    --data.source.policy_rows 64 --dashboard.artifacts true --trainer.val_check_interval 3""".split()
GAUGES = {"time/step", "time/backward", "time/update", "time/sample", "time/forward", "speed/tokens", "memory/cpu"}
ROLLOUT = {"train/reward", "train/kl", "train/entropy", "train/length", "train/truncated", "train/loss"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of three steps, and of one of two more that goes on with it; the first one's trainer."""
    import wandb

    folder = tmp_path_factory.mktemp("dashboard")
    save_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(sys, "argv", ["main.py"])
        patch.setenv("WANDB_DATA_DIR", str(folder))
        # W&B's service, if an earlier test has started it, lives in another folder.
        fit = [*FIT, "--trainer.logger.save_dir", str(folder / "outputs")]
        first = run([*fit, "--trainer.max_steps", "3"])
        wandb.finish()
        run([*fit, "--trainer.max_steps", "5", "--ckpt_path", "last"])
        wandb.finish()
    return folder, first.trainer


@pytest.fixture(scope="module")
def folder(runs):
    return runs[0]


@pytest.fixture(scope="module")
def boards(folder):
    return [read(path) for path in sorted(folder.glob("outputs/wandb/offline-run-*"))]


def test_every_metric_has_the_training_step_as_axis(boards):
    first = boards[0]
    for name, meaning in METRICS.items():
        axis, summaries = first.metrics[name]
        assert axis == STEP and summaries == set(meaning.summary.split(","))
        assert first.config["units"][name] == meaning.unit
    rows = [row for row in first.history if "train/loss" in row]
    assert [row[STEP] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row.keys() >= GAUGES | ROLLOUT
    assert any(name.startswith("offset/") for name in rows[0])
    assert any(re.fullmatch("train/reward/.+", name) for name in rows[0])


def test_what_is_logged_is_explained(boards):
    page = (ROOT / "docs" / "dashboards.md").read_text()
    assert all(f"`{name}`" in page for name in METRICS)
    names = {name for board in boards for row in board.history for name in row}
    names -= {STEP, "epoch", "lr-AdamW"}
    logged = {name for name in names if not name.startswith(("_", "completions"))}
    assert len(logged) > 40
    assert [name for name in logged if not any(fnmatch.fnmatch(name, known) for known in METRICS)] == []


def test_a_resumed_training_goes_on_in_its_run(boards, folder):
    first, second = boards
    assert first.id == second.id != ""
    assert [row[STEP] for row in second.history if "train/loss" in row] == [3, 4]
    files = sorted(folder.glob("outputs/quickstart/policy/version_*/wandb_run.json"))
    assert [json.loads(path.read_text())["id"] for path in files] == [first.id] * 2


def test_checkpoints_and_answers_are_artifacts(boards):
    first, second = boards
    checkpoint, answers = f"checkpoint-{first.id}", f"completions-{first.id}"
    assert first.artifacts.items() >= {checkpoint: "checkpoint", answers: "completions"}.items()
    assert checkpoint in second.artifacts and answers not in second.artifacts  # no table fell into its two steps


@pytest.fixture
def shown_by(folder, monkeypatch):
    """What a `test` with W&B shows, given its config and further options."""
    import wandb

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("WANDB_DATA_DIR", str(folder))

    def tested(config, options):
        board = f"--config {ROOT}/configs/logger/wandb.yaml --trainer.logger.save_dir {folder}/{Path(config).stem}"
        run(f"test --config {ROOT}/{config} {board} {FEW_STEPS} {options}".split())
        wandb.finish()
        (path,) = folder.glob(f"{Path(config).stem}/wandb/offline-run-*")
        return read(path)

    return tested


def test_a_classifier_s_test_shows_its_pictures_and_its_report_is_an_artifact(shown_by):
    rows = "--ckpt_path none --data.source.reward_rows 16 --data.source.bare_rows 8"
    board = shown_by("configs/quickstart/reward.yaml", f"{rows} --dashboard.artifacts true")
    assert board.artifacts.items() >= {f"report-{board.id}": "report"}.items()
    assert board.pictures.keys() >= {"test/confusion", "test/reliability"}
    assert all(picture.read_bytes().startswith(PNG) for (picture,) in board.pictures.values())


def test_a_policy_s_test_shows_its_pictures(shown_by):
    options = f"{SMALL_POLICY} --ckpt_path last --data.source.policy_rows 64"
    board = shown_by("configs/quickstart/policy.yaml", options)
    assert board.pictures.keys() >= {"steerability/requested_achieved", "steerability/cross_talk"}
    assert all(picture.read_bytes().startswith(PNG) for (picture,) in board.pictures.values())
    assert any("steerability/mean/exact" in row for row in board.history)


def test_the_same_gauges_need_no_account(runs):
    folder, trainer = runs
    with open(folder / "outputs/quickstart/policy/version_0/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert all(row[name] for name in GAUGES | ROLLOUT)
        assert float(row["time/step"]) > float(row["time/backward"]) + float(row["time/update"]) > 0
        assert 0.01 < float(row["memory/cpu"]) < 64
        assert 0 < float(row["speed/tokens"]) < 1e6
    assert isinstance(trainer.progress_bar_callback, RichProgressBar)
    shown = trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module)
    assert shown.keys() >= {"train/reward", "train/kl", "speed/tokens"}


def test_tensorboard_by_its_logger(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    run(
        f"""fit --config {ROOT}/configs/quickstart/policy.yaml {FEW_STEPS} {SMALL_POLICY} {ONE_EACH}
        --trainer.limit_val_batches 0 --data.source.policy_rows 64 --trainer.log_every_n_steps 1
        --trainer.default_root_dir outputs/board
        --trainer.logger lightning.pytorch.loggers.TensorBoardLogger --trainer.logger.save_dir outputs""".split()
    )
    (file,) = folder.glob("outputs/lightning_logs/version_0/events.out.*")
    logged = {}
    for step, value in summaries(file):
        logged.setdefault(step, {})[value.tag] = value.simple_value
    assert all(logged[step].keys() >= GAUGES | ROLLOUT for step in (0, 1))
    assert (folder / "outputs/board/version_0/metrics.csv").exists()


def test_a_guard_s_file_is_replayed_on_the_command_line(folder, monkeypatch, capsys):
    """The guard warned of answers cut at the length limit; the run's own config.yaml is all that is needed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    (kept, *_) = sorted(folder.glob("outputs/quickstart/policy/version_0/guards/truncated-step*.ckpt"))
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    run(["replay", "--config", "outputs/quickstart/policy/version_0/config.yaml", "--ckpt_path", str(kept)])
    out = capsys.readouterr().out
    loss, noted = re.search("loss (.+), noted when it tripped: (.+)", out).groups()
    assert loss == noted and "guard `truncated`: all 8 completions were cut at the length limit" in out
    assert sorted(folder.rglob("*")) == before  # nothing was written
