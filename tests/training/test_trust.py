"""What a stranger's folder or config can make a command do."""

import json
import sys
from pathlib import Path

import pytest

from moslim.cli import main, run
from moslim.training.trust import check_configs, imports_from_here, with_defaults
from moslim.utils.errors import UsageError
from tests.helpers.cli_folder import CONFIG

EVIL = "open('ran', 'w').close()\nfrom tests.helpers import cli_parts\nclass Model(cli_parts.Model): pass\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a config of one's own and a stranger's model, which brings a config and a module."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["main.py"])
    Path("config.yaml").write_text(CONFIG)
    shared = Path("shared")
    shared.mkdir()
    dimensions = [["tone", ["bad", "good"]]]
    (shared / "config.json").write_text(
        json.dumps({"model_type": "moslim_preference_classifier", "dimensions": dimensions})
    )
    for place in (shared / "deep", tmp_path / "elsewhere"):
        place.mkdir()
        (place / "predict.yaml").write_text(CONFIG.replace("tests.helpers.cli_parts.Model", "evil_lab.Model"))
    for name in ("part", "part.json"):
        (shared / "deep" / name).write_text('{"class_path": "evil_lab.Model"}')
    for place in (here, shared):
        (place / "evil_lab.py").write_text(EVIL)
    return here


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "shared/deep/predict.yaml"],
        ["--config=shared/deep/predict.yaml"],
        ["-c", "shared/deep/predict.yaml"],
        ["--config", "config.yaml", "--config", "shared/../shared/deep/predict.yaml"],
        ["--config", "config.yaml", "--model", "shared/deep/predict.yaml"],
        ["--config", "config.yaml", "--model", "shared/deep/part.json"],
        ["--config", "config.yaml", "--model=shared/deep/part"],
    ],
)
def test_a_config_in_the_folder_of_a_model_is_refused(options):
    with pytest.raises(UsageError, match=r"lies in the folder of a model, .*: a config is code"):
        run(["fit", *options])
    assert not Path("ran").exists()


def test_rows_in_the_folder_of_a_model_are_no_config():
    """Also where a text says `class_path`."""
    Path("shared/rows.jsonl").write_text('{"question": "What is class_path:"}\n' * 2)
    Path("shared/rows.csv").write_text("question\n'{class_path: a.B}'\n")
    check_configs(["predict", "--data.source.predict", "shared/rows.jsonl", "--data.source.test=shared/rows.csv"])


def test_a_config_from_elsewhere_imports_nothing_from_here(tmp_path):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "elsewhere/predict.yaml")])
    assert not Path("ran").exists()


def test_ones_own_classes_are_imported_from_here():
    run(["fit", "--config", "config.yaml", "--model", "evil_lab.Model"])
    assert Path("ran").exists() and sys.path[-1] == str(Path.cwd())  # behind every library


def test_nothing_is_imported_from_the_folder_of_a_model(monkeypatch):
    assert imports_from_here(["predict", "--model.classifier", "shared"])
    monkeypatch.chdir("shared")
    assert not imports_from_here(["predict", "--model.classifier", ".", "--model.mapping", "evil_lab.Model"])


def test_a_config_of_somebody_else_with_one_s_own_class_on_the_command_line(tmp_path):
    elsewhere = ["fit", "--config", str(tmp_path / "elsewhere/predict.yaml")]
    assert not imports_from_here(elsewhere)
    assert imports_from_here([*elsewhere, "--trainer.callbacks", "{class_path: evil_lab.Mine}"])
    assert imports_from_here([*elsewhere, "--config", "config.yaml"])


def test_a_function_of_python_that_starts_programs_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", "--model.function", "os.system"])
    assert "os.system" in capsys.readouterr().err


def test_a_shared_classifier_needs_no_config():
    given = with_defaults(["predict", "--model.classifier", "shared", "--data.source.predict", "rows.jsonl"])
    assert given[0] == "predict" and given[-2:] == ["--data.source.predict", "rows.jsonl"]
    assert given[given.index("--preferences.dimensions") + 1] == '{"tone": ["bad", "good"]}'
    assert given[given.index("--model") + 1] == "moslim.RewardClassifier"
    own = ["predict", "--config", "config.yaml", "--model.classifier", "shared"]
    assert with_defaults(own) == own and with_defaults(["fit", *own[1:]]) == ["fit", *own[1:]]
