import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moslim.cli import hide_library_messages, one_line_warnings, run
from tests.helpers.cli_folder import PARTS, folder  # noqa: F401  # a working folder for each test
from tests.helpers.tiny_world import FEW_STEPS, SMALL_POLICY, save_world

ROOT = Path(__file__).parents[1]
NOISE = r"(?i)\btip\b|FLOPs|eval mode|many workers|LeafSpec|deprecat|available: |DataLoader 0|Test metric|sanity metric"


def test_only_what_matters_is_said(caplog, capsys, recwarn):
    hide_library_messages()
    caplog.set_level("INFO")
    run(
        [
            "fit",
            "--config",
            "config.yaml",
            "--model",
            f"{PARTS}.PartlyInEval",
            "--trainer.limit_train_batches",
            "2",
        ]
    )
    said = [record.getMessage() for record in caplog.records] + [str(one.message) for one in recwarn]
    assert said == ["`Trainer.fit` stopped: `max_epochs=1` reached."]
    assert re.findall(NOISE, "".join(capsys.readouterr())) == []


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    one_line_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        print(warnings.formatwarning("rows.csv: 3 rows are skipped", UserWarning, "loader.py", 7), end="")
    assert capsys.readouterr().out == "warning: rows.csv: 3 rows are skipped\n"


@pytest.mark.slow
def test_a_policy_is_tested_without_noise(tmp_path):
    save_world(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    options = f"{FEW_STEPS} {SMALL_POLICY} --trainer.default_root_dir run --ckpt_path none".split()
    command = [sys.executable, ROOT / "main.py", "test", "--config", "configs/quickstart/policy.yaml", *options]
    shell = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT / "src")}
    said = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True, check=True)
    assert re.findall(NOISE, said.stdout + said.stderr) == []
    table = said.stdout.split("\n\n")[0].splitlines()
    assert table[0] == "Steerability, 1 questions, judge: gold"
    assert table[1].split() == "dimension Spearman exact within one MAE monotonicity range".split()
    names = "verbosity formality warmth helpfulness mean".split()
    rows = [line.split() for line in table[3:]]
    assert [row[0] for row in rows] == [*names, "before", *names]
    assert all(re.fullmatch(r"-?\d\.\d{3}|-", cell) for row in rows if row[0] != "before" for cell in row[1:])
    assert max(map(len, table)) <= 80
