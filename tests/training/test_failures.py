"""What a user sees of an error, and the status of the command."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from moslim.callbacks.guards import GateError, GuardError
from moslim.cli import main
from moslim.generation.vllm_engine import ParityError
from moslim.mapping.weighted import main as fit_user_weights
from moslim.training.command_errors import failure
from moslim.utils.errors import MissingFileError, UsageError
from tests.helpers.cli_folder import CONFIG, PARTS
from tests.helpers.cli_parts import Data, Model
from tests.helpers.forked import in_two

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("MOSLIM_DEBUG", "")  # and put back if --debug sets it
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


class Raising(Callback):
    """Raises while the run is under way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, *_):
        if self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise KINDS[self.kind]


KINDS = {
    "usage": UsageError("rows.csv, line 7, field 'warmth': 9 is no level"),
    "guard": GuardError("guard `kl`: too far"),
    "gate": GateError("the gate failed"),
    "parity": ParityError("the server computes something else"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "interrupt": KeyboardInterrupt(),
    "own": RuntimeError("a fault of the user's own"),
}


class Worker(Data):
    """Its rows are read by another process, which finds a mistake."""

    def train_dataloader(self):
        return DataLoader(_Faulty(), num_workers=1, multiprocessing_context="fork")


class _Faulty(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise UsageError(f"rows.csv, line {index + 1}: no answer")


class Broken(Model):
    """Fails when it is built, as a class of the user's own may."""

    def __init__(self, count: int = 0) -> None:
        raise KeyError("missing")


def ended(capsys, *args, command=main):
    """Runs a command that must end by itself, and returns its status and what it says."""
    with pytest.raises(SystemExit) as stop:
        command(list(args))
    return stop.value.code, capsys.readouterr().err


def fails(capsys, kind, *options):
    callback = f"{{class_path: tests.training.test_failures.Raising, init_args: {{kind: {kind}}}}}"
    return ended(capsys, "fit", "--config", "config.yaml", "--trainer.callbacks", f"[{callback}]", *options)


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("usage", 2, "error: rows.csv, line 7, field 'warmth': 9 is no level\n"),
        ("guard", 1, "error: guard `kl`: too far\n(--debug shows the traceback)\n"),
        ("gate", 1, "error: the gate failed\n"),
        ("parity", 1, "error: the server computes something else\n"),
        ("memory", 1, "error: out of memory: CUDA out of memory. Tried to allocate 2 GiB.\nSmaller batches"),
        ("interrupt", 130, ""),
        ("sigterm", 143, ""),
    ],
)
def test_a_known_failure_is_one_message(capsys, kind, status, said):
    code, err = fails(capsys, kind)
    assert code == status and said in err and "Traceback" not in err


def test_debug_shows_the_traceback_and_keeps_the_status(capsys, monkeypatch):
    code, err = fails(capsys, "usage", "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("9 is no level\n")
    monkeypatch.setenv("MOSLIM_DEBUG", "1")
    assert "Traceback" in fails(capsys, "guard")[1]


def test_an_error_of_the_users_own_keeps_its_traceback():
    config = ["fit", "--config", "config.yaml"]
    callback = "{class_path: tests.training.test_failures.Raising, init_args: {kind: own}}"
    with pytest.raises(RuntimeError, match="a fault of the user's own"):
        main([*config, "--trainer.callbacks", f"[{callback}]"])
    with pytest.raises(KeyError, match="missing"):
        main([*config, "--model", "tests.training.test_failures.Broken"])
    Path("my_broken_lab.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        main([*config, "--model.squash", "my_broken_lab.Mine"])


def test_a_mistake_that_another_process_finds(capsys):
    code, err = ended(capsys, "fit", "--config", "config.yaml", "--data", "tests.training.test_failures.Worker")
    assert (code, err.splitlines()[-1]) == (2, "error: rows.csv, line 1: no answer")


def _fails_in_a_process(message):
    raise MissingFileError(message)


def test_a_mistake_that_comes_through_a_launcher():
    with pytest.raises(Exception, match="Traceback") as raised:
        in_two(_fails_in_a_process, "model 'x': there is no such folder")
    found = failure(raised.value)
    assert (found.message, found.status) == ("model 'x': there is no such folder", 2)


def test_a_mistake_that_a_library_wraps():
    try:
        raise ValueError("while reading a data set") from UsageError("rows.csv: no column")
    except ValueError as error:
        assert failure(error).message == "rows.csv: no column"
    try:
        try:
            raise UsageError("handled")
        except UsageError:
            raise KeyError("something else") from None
    except KeyError as error:
        assert failure(error) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.accelerator", "gpu"], "trainer: "),
        (["--trainer.strategy", "nonsense"], "trainer: You selected an invalid strategy name"),
        (["--trainer.max_epoch", "3"], "did you mean --trainer.max_epochs?"),
        (
            ["--model.squash", f"{PARTS}.Squash", "--model.squash.gain", "x"],
            "model.squash.gain (of tests.helpers.cli_parts.Squash): exp",
        ),
        (
            ["--preferences.dimensions", "5"],
            "preferences.dimensions (of moslim.PreferenceSet): expected Mapping, not 5",
        ),
        (["--preferences.dimensions.warmth", "[a, a]"], "names a level twice"),
        (["--config", "more.yaml"], "more.yaml: trainer.max_epochs: expected int, not many"),
        (["--config", "broken.yaml"], "broken.yaml: "),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_one_message(capsys, options, said):
    if torch.cuda.is_available() and "gpu" in options:
        pytest.skip("there is a GPU")
    Path("more.yaml").write_text("trainer: {max_epochs: many}")
    Path("broken.yaml").write_text("trainer: {max_epochs: [}")
    code, err = ended(capsys, "fit", "--config", "config.yaml", *options)
    assert code == 2 and said in err
    assert len([line for line in err.splitlines() if "Seed set" not in line]) <= 4 and "Subtypes" not in err


def test_taste_says_it_in_one_line_too(capsys):
    options = ["--choices", "none.jsonl", "--classifier", "none", "--output", "user_weights.json"]
    assert ended(capsys, *options, command=fit_user_weights) == (
        2,
        "error: --choices none.jsonl: there is no such file\n",
    )
    assert ended(capsys, "--choises", "x", command=fit_user_weights)[0] == 2


def test_a_config_that_is_no_utf8_is_named(capsys):
    Path("windows.yaml").write_bytes("preferences: {dimensions: {größe: [klein, groß]}}".encode("cp1252"))
    code, err = ended(capsys, "fit", "--config", "config.yaml", "--config", "windows.yaml")
    assert code == 2 and err.startswith("error: windows.yaml: a config must be UTF-8 text ('utf")
