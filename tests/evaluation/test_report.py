import csv
import json

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.steerability import steerability
from moslim.evaluation.steerability_report import log_report, scalars, write_report


@pytest.fixture
def result(trained, starting, preferences):
    return steerability(trained, starting, preferences, JudgeInfo("gold", proxy=False), {"seed": 0})


def test_a_folder_with_everything(result, tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,train/proxy,train/gold\n0,0.2,0.1\n1,0.4,0.3\n")
    folder = tmp_path / "deep" / "report"
    paths = write_report(result, folder, metrics)
    assert set(paths) == {"json", "report", "requested_achieved", "cross_talk", "learning_curves"}
    assert sorted(folder.iterdir()) == sorted(paths.values())  # no partial file is left
    assert json.loads(paths["json"].read_text()) == result
    page = paths["report"].read_text()
    for name in ("requested_achieved", "cross_talk", "learning_curves"):
        assert f"({name}.png)" in page
        with Image.open(paths[name]) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 300


def test_writing_twice_gives_the_same_bytes(result, tmp_path):
    first = {name: path.read_bytes() for name, path in write_report(result, tmp_path).items()}
    assert {name: path.read_bytes() for name, path in write_report(result, tmp_path).items()} == first
    assert "learning_curves" not in first


def test_scalars_leave_out_what_was_not_measured(result):
    result["interference"] = None
    values = scalars(result)
    assert values["steerability/mean/spearman"] == 0.25
    assert values["steerability/length/mae"] == 0.5
    assert values["steerability/reward/gap"] == -0.058333
    assert values["steerability/seen/joint_exact"] == 0.5
    assert not {"steerability/unseen/mae", "steerability/interference"} & set(values)


@pytest.mark.slow
def test_loggers_get_figures_and_pictures(result, tmp_path):
    import wandb

    paths = write_report(result, tmp_path / "report")
    table = CSVLogger(tmp_path / "csv")
    board = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    log_report([table, board], paths, result, step=7)
    wandb.finish()
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["step"], row["steerability/mean/exact"]) == ("7", "0.583333")
    pictures = {path.name.split("_7_")[0].split("_")[0] for path in tmp_path.glob("wandb/offline-run*/files/**/*.png")}
    assert pictures == {"requested", "cross"}
