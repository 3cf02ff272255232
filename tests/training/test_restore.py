"""``--ckpt_path last`` and ``best``: by run and step, wherever the files were copied to, and past damaged ones."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from moslim.callbacks.monitors import StepCheckpoint
from moslim.cli import run
from moslim.preferences import PreferenceSet
from moslim.training.checkpointing import best_checkpoint_of, newest_checkpoint
from moslim.training.trainer import MoslimTrainer
from moslim.utils.errors import MissingFileError, UsageError
from tests.helpers.cli_folder import CONFIG, PARTS
from tests.helpers.cli_parts import Data, Plain

PREFERENCES = PreferenceSet({"warmth": ["cold", "warm"]})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder with ``config.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", ["main.py"])
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


class Rising(Plain):
    """Logs the step under a name with ``/``; ``scale`` below 0 makes it fall."""

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        self.log("val/mean/kappa", self.scale * (self.global_step + 1), on_step=True)
        return super().training_step(batch, number)


def fit(
    kind: type[Plain] = Plain, scale: float = 1.0, epochs: int = 1, steps: int = -1, **options: Any
) -> MoslimTrainer:
    """Ten steps an epoch, and a checkpoint after each third one, as the command line makes them."""
    saver = StepCheckpoint(**{"every_n_train_steps": 3, "save_last": True, "save_top_k": -1, **options})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    limits = {"max_epochs": epochs, "max_steps": steps}
    run = MoslimTrainer(
        default_root_dir="outputs", logger=CSVLogger("outputs", ""), callbacks=[saver], **quiet, **limits
    )
    run.fit(kind(scale), Data(PREFERENCES, rows=20))
    return run


def scrambled(folder: Path) -> None:
    """Gives files the times that a copy may give them: the later the step, the older."""
    for age, path in enumerate(sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1e9 - age, 1e9 - age))


def write(path: Path, step: int, **more: object) -> Path:
    """A checkpoint as other versions of this package wrote it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": step}
    torch.save({**content, **{key: [] for key in ("loops", "optimizer_states", "lr_schedulers")}, **more}, path)
    return path


def test_a_copied_run_goes_on_from_its_last_step() -> None:
    fit()
    Path("outputs").rename("before")
    shutil.copytree("before", "outputs")
    scrambled(Path("outputs"))
    options = [
        "--config",
        "config.yaml",
        "--model",
        f"{PARTS}.Plain",
        "--data.rows",
        "20",
        "--trainer.max_epochs",
        "2",
    ]
    assert run(["fit", *options, "--ckpt_path", "last"]).trainer.ckpt_path.endswith("last.ckpt")
    shutil.rmtree("outputs/version_1")
    Path("outputs/version_0/checkpoints/last.ckpt").unlink()
    assert newest_checkpoint(["outputs"]).name == "epoch=0-step=9.ckpt"


def test_runs_are_ordered_by_number_and_steps_within_them() -> None:
    for version, step in [(2, 9), (10, 3), (9, 7)]:
        write(Path(f"outputs/version_{version}/checkpoints/a-step={step}.ckpt"), step)
    newest = write(Path("outputs/version_10/checkpoints/b.ckpt"), 5)
    write(Path("outputs/version_10/checkpoints/z-step=99.ckpt"), 4)  # its name does not count
    (Path("outputs") / "version_11" / "checkpoints").mkdir(parents=True)
    scrambled(Path("outputs"))
    assert newest_checkpoint(["outputs"]) == newest


def test_of_equal_steps_last_is_the_newest() -> None:
    expected = write(Path("outputs/checkpoints/last.ckpt"), 5)
    write(Path("outputs/checkpoints/epoch=0-step=5.ckpt"), 5)
    write(Path("outputs/checkpoints/epoch=0-step=3-v1.ckpt"), 3)
    assert newest_checkpoint(["outputs"]) == expected


def test_runs_that_share_a_folder_are_told_apart() -> None:
    fit(dirpath="kept", save_last=False)
    fit(dirpath="kept", save_last=False, steps=3)
    scrambled(Path("kept"))
    names = sorted(path.name for path in Path("kept").iterdir())
    assert names == ["epoch=0-step=3-v1.ckpt", *(f"epoch=0-step={step}.ckpt" for step in (3, 6, 9))]
    assert newest_checkpoint([], ["kept"]).name == names[0]


def test_a_guard_s_file_is_never_taken() -> None:
    expected = write(Path("outputs/version_0/checkpoints/a.ckpt"), 5)
    write(Path("outputs/version_0/guards/kl-step8.ckpt"), 8, guard={"guard": "kl"})
    write(Path("outputs/version_0/checkpoints/moved.ckpt"), 9, guard={"guard": "kl"})
    assert newest_checkpoint(["outputs"], ["outputs/version_0"]) == expected
    expected.unlink()
    with pytest.raises(MissingFileError, match="no checkpoint under outputs, outputs/version_0; run `fit`"):
        newest_checkpoint(["outputs"], ["outputs/version_0"])


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken off", b"no checkpoint"])
def test_damaged_checkpoints_are_left_out_with_a_warning(damage: bytes) -> None:
    folder = Path("outputs/version_0/checkpoints")
    for step in (3, 6, 9):
        write(folder / f"step={step}.ckpt", step)
    (folder / "last.ckpt").write_bytes(damage)
    raw = (folder / "step=9.ckpt").read_bytes()
    place = raw.index(b"state_dict")
    (folder / "step=9.ckpt").write_bytes(raw[:place] + b"x" + raw[place + 1 :])
    with pytest.warns(UserWarning, match=r"last leaves out .*step=9.ckpt: it is damaged .*; it takes .*step=6.ckpt"):
        assert newest_checkpoint(["outputs"]).name == "step=6.ckpt"


@pytest.mark.parametrize("place", [{}, {"dirpath": "kept"}])
@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw.replace(b"layer.weight", b"layer.waight")]
)
def test_the_newest_of_a_run_is_not_left_out_in_silence(damage: Any, place: dict[str, str]) -> None:
    fit(**place)
    for name in ("epoch=0-step=3.ckpt", "epoch=0-step=9.ckpt", "last.ckpt"):
        (path,) = Path().rglob(name)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning) as said:
        assert newest_checkpoint(["outputs"], place.values()).name == "epoch=0-step=6.ckpt"
    left_out = [str(one.message) for one in said if "last leaves out" in str(one.message)]
    assert len(left_out) == 2 and "last.ckpt: it is" in left_out[0] and "step=9.ckpt: it is" in left_out[1]


def touch(path: str) -> Path:
    Path(path).touch()
    return Path(path)


class Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        return touch, ("ran",)


def test_order_and_best_are_read_without_running_what_a_file_holds() -> None:
    fit(**MONITORED, scale=-1.0)
    last = Path("outputs/version_0/checkpoints/last.ckpt")
    torch.save({**torch.load(last, weights_only=True), "parts": [Path("a"), nn.Linear(1, 1), Touches()]}, last)
    assert newest_checkpoint(["outputs"], weights_only=False) == last
    assert best_checkpoint_of(last).name == "epoch=0-step=3.ckpt"
    assert not Path("ran").exists()
    with pytest.warns(UserWarning, match=r"leaves out .*last.ckpt: it holds other things than tensors"):
        assert newest_checkpoint(["outputs"]).name == "epoch=0-step=3.ckpt"


def test_a_link_back_to_its_folder_is_not_followed() -> None:
    expected = write(Path("outputs/version_0/checkpoints/a.ckpt"), 5)
    (expected.parent / "here").symlink_to(".")
    assert newest_checkpoint(["outputs"]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["last", "--checkpoint.dirpath", "memory://kept"], "last looks on this machine only, not in memory://kept"),
        (["best", "--trainer.default_root_dir", "memory://runs"], "best looks .* not in memory://runs"),
        ([""], "--ckpt_path is empty"),
    ],
)
def test_what_names_no_file_here_is_refused(options: list[str], message: str) -> None:
    fit()
    with pytest.raises(UsageError, match=message):
        run(["test", "--config", "config.yaml", "--ckpt_path", *options])


def test_nothing_but_damaged_checkpoints_is_an_error_that_names_them() -> None:
    Path("outputs").mkdir()
    Path("outputs/a.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no good checkpoint. outputs/a.ckpt: it is empty"):
        newest_checkpoint(["outputs"])
    with pytest.raises(MissingFileError, match="no checkpoint under elsewhere"):
        newest_checkpoint(["elsewhere"])


MONITORED = {"kind": Rising, "monitor": "val/mean/kappa", "mode": "max", "save_top_k": 1}
DEEP = {"filename": "{step}-{val/mean/kappa:.1f}"}


@pytest.mark.parametrize("place", [{}, {"dirpath": "kept"}])
def test_a_name_with_a_slash_is_found(place: dict[str, str]) -> None:
    fit(**MONITORED, **DEEP, **place, save_last=False)
    scrambled(Path())
    (deep,) = Path().rglob("*9.0.ckpt")
    assert deep.parent.name == "mean"
    assert newest_checkpoint(["outputs"], place.values()) == deep


@pytest.mark.parametrize("options", [{}, DEEP, {"dirpath": "kept"}])
def test_the_best_is_found_by_another_process_and_after_a_move(options: dict[str, str], folder: Path) -> None:
    fit(**MONITORED, **options, scale=-1.0)  # the first is the best

    def best() -> Path:
        return best_checkpoint_of(newest_checkpoint(["outputs"], filter(Path.exists, [Path("kept")]))).resolve()

    assert torch.load(best(), weights_only=True)["global_step"] == 3
    Path("moved").mkdir()
    for top in {"outputs", options.get("dirpath", "outputs")}:
        shutil.copytree(top, Path("moved") / top)  # the original stays, and must not be taken
    scrambled(Path("moved"))
    os.chdir("moved")
    assert best().is_relative_to(folder / "moved") and torch.load(best(), weights_only=True)["global_step"] == 3


def test_the_best_of_a_run_that_went_on_elsewhere_may_be_the_one_before() -> None:
    fit(**MONITORED, scale=-1.0)
    (best,) = Path("outputs/version_0/checkpoints").glob("*step=3.ckpt")
    state = torch.load("outputs/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (own,) = (one for key, one in state.items() if "StepCheckpoint" in key)
    own["dirpath"] = str(Path("outputs/version_1/checkpoints"))
    newest = write(Path("outputs/version_1/checkpoints/last.ckpt"), 12, callbacks=state)
    assert best_checkpoint_of(newest).resolve() == best.resolve()
    Path("outputs").rename("moved")
    assert (
        best_checkpoint_of(Path("moved") / newest.relative_to("outputs"))
        == Path("moved/version_0/checkpoints") / best.name
    )


@pytest.mark.slow
def test_without_a_best_checkpoint_it_is_said_how_to_get_one() -> None:
    fit()
    with pytest.raises(UsageError, match=r"says of no best checkpoint: train with --checkpoint.monitor METRIC"):
        run(["test", "--config", "config.yaml", "--ckpt_path", "best"])
    fit(**MONITORED, scale=-1.0)
    (best,) = Path("outputs/version_1/checkpoints").glob("*step=3.ckpt")
    tested = run(["test", "--config", "config.yaml", "--ckpt_path", "best"])
    assert Path(tested.trainer.ckpt_path).resolve() == best.resolve()
    best.unlink()
    with pytest.raises(UsageError, match=r"step=3.ckpt, the best by val/mean/kappa .* is neither there nor beside it"):
        best_checkpoint_of(newest_checkpoint(["outputs"]))
