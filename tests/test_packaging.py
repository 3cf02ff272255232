"""What a fresh installation relies on."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moslim

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(*keys: str) -> list[Requirement]:
    options = setup_cfg()
    section = {**options["options"], **options["options.extras_require"]}
    lines = [line.strip() for key in keys for line in section[key].splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def test_every_dependency_is_pinned_within_its_range():
    tested, oldest = pins("constraints.txt"), pins("constraints-min.txt")
    for needed in requirements("install_requires", "benchmarks", "deepspeed", "test", "lint"):
        assert needed.specifier.contains(tested[canonicalize_name(needed.name)]), needed
    for needed in requirements("install_requires"):
        assert needed.specifier.contains(oldest[canonicalize_name(needed.name)]), needed


def test_torch_is_pinned_without_a_build_tag():
    assert pins("constraints.txt")["torch"] == "2.13.0"


def test_the_command_line_library_stays_below_its_next_major_version():
    jsonargparse = next(one for one in requirements("install_requires") if one.name == "jsonargparse")
    assert not jsonargparse.specifier.contains("5.0.0")
    assert jsonargparse.extras == {"signatures"}


def test_releases_of_lightning_that_run_what_a_checkpoint_names_are_excluded():
    lightning = next(one for one in requirements("install_requires") if one.name == "lightning")
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.0", "2.6.2", "2.6.3", "2.6.5", "2.7.0"))
    assert lightning.specifier.contains("2.6.6")
    assert {"!=2.6.2", "!=2.6.3"} <= {str(one) for one in lightning.specifier}


def test_installed_metadata():
    assert importlib.metadata.version("moslim") == moslim.__version__
    script = next(one for one in importlib.metadata.entry_points(group="console_scripts") if one.name == "moslim")
    assert script.load().__module__ == "moslim.cli"


def test_public_names():
    for name in moslim.__all__:
        assert getattr(moslim, name).__name__ == name
        assert name in dir(moslim)
    with pytest.raises(AttributeError, match="no attribute 'PolicyTrainner'"):
        _ = moslim.PolicyTrainner


@pytest.mark.slow
def test_import_registers_the_classifier_and_stays_light():
    code = """
import sys, moslim
from transformers import AutoModelForSequenceClassification
from moslim.reward.modeling import PreferenceClassifierConfig
assert PreferenceClassifierConfig in AutoModelForSequenceClassification._model_mapping
print([name for name in ("lightning", "peft", "datasets", "wandb", "matplotlib") if name in sys.modules])
import moslim.cli
print([name for name in ("peft", "datasets", "wandb") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_configs_open_with_their_command_and_name_classes_in_full(path):
    text = path.read_text()
    if path.parent.name != "preferences":  # these are values of one key, not configs
        command = ("# python main.py ", "# wandb sweep ")
        assert text.startswith(command), "the first line is the command that uses the file"
    for name in re.findall(r"class_path: *([\w.]+)", text):
        assert "." in name, f"{name}: two libraries may have a class of this name"


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_runs_them_outside_a_checkout(tmp_path):
    checkout, place = tmp_path / "checkout", tmp_path / "installed"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", checkout / "src", symlinks=True, ignore=skipped)
    shutil.copytree(ROOT / "configs", checkout / "configs")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(place), str(checkout)], check=True, capture_output=True, text=True)
    shutil.rmtree(checkout)
    installed = place / "moslim/configs"
    assert {str(file.relative_to(installed)) for file in installed.rglob("*.yaml")} == {
        str(file.relative_to(ROOT / "configs")) for file in CONFIGS
    }
    code = "import moslim; from moslim.cli import main; print(moslim.__file__); main()"
    command = ["fit", "--config", "configs:quickstart/policy.yaml", "--config", "configs:quickstart/scrambled.yaml"]
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--print_config"],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, _, printed = done.stdout.partition("\n")
    assert file == str(place / "moslim/__init__.py")
    assert "scramble: true" in printed and "verbosity:" in printed
