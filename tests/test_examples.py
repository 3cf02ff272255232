"""Runs the files of ``examples/`` on tiny models of the embedded world."""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moslim.cli import run
from tests.helpers.tiny_world import FEW_STEPS, ONE_EACH, SMALL_POLICY, save_world

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CONFIG = "configs/quickstart/policy.yaml"
OPTIONS = f"{FEW_STEPS} {SMALL_POLICY} {ONE_EACH} --trainer.callbacks null --trainer.max_steps 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the quickstart's configs, models and exported policy, from which the examples can be imported."""
    folder = tmp_path_factory.mktemp("examples")
    save_world(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(sys, "argv", ["main.py"])
        patch.syspath_prepend(str(EXAMPLES))
        run(["export", "--config", CONFIG, "--ckpt_path", "none", "--out", "outputs/quickstart/export"])
        yield folder


def test_every_example_is_run() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"custom_algorithm.py", "custom_mapping.py", "python_api.py", "steer_a_policy.ipynb"}


@pytest.mark.slow
def test_the_api_answers_and_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("python_api").main()
    said = capsys.readouterr().out
    assert "formality: slangy, casual" in said and said.count(" achieved: ") == 2 and said.count("expected warmth") == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "option"),
    [
        ("custom_mapping", "mapping custom_mapping.WithinOne --model.mapping.near 0.3"),
        ("custom_algorithm", "policy_optimizer custom_algorithm.MedianBaseline --model.policy_optimizer.limit 1"),
    ],
)
def test_a_class_of_one_s_own_is_trained_with(module: str, option: str, folder: Path) -> None:
    example = importlib.import_module(module)
    assert f"--model.{option}" in example.__doc__
    assert example.main(max_steps=1).global_step == 1
    name, value = (f"--model.{option}".split()[i] for i in (1, 3))
    chosen = getattr(run(["fit", "--config", CONFIG, *f"--model.{option}".split(), *OPTIONS]).model, option.split()[0])
    assert type(chosen).__name__ == name.rpartition(".")[2]
    assert float(value) in (getattr(chosen, "near", None), getattr(chosen, "limit", None))


def test_the_notebook_runs_from_start_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "steer_a_policy.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert set(names["scores"]) == {0, 4} and "warmth 4 requested" in capsys.readouterr().out
