"""Damaged, foreign and half-written checkpoints, and those that a kill leaves."""

import io
import os
import shutil
import signal
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors.torch import save_file
from torch import nn

from moslim.preferences import PreferenceSet
from moslim.training.base_module import RunModule
from moslim.training.checkpoint_files import problem
from moslim.training.checkpointing import restore
from moslim.training.trainer import MoslimTrainer
from moslim.utils.errors import MissingFileError, UsageError
from tests.helpers.cli_parts import Data, Plain

PREFERENCES = PreferenceSet({"warmth": ["cold", "warm"]})


def trainer(folder: Path, **options: object) -> MoslimTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return MoslimTrainer(
        default_root_dir=folder, **{**quiet, "enable_checkpointing": False, "max_epochs": 1, **options}
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run."""
    folder = tmp_path_factory.mktemp("good")
    run = trainer(folder)
    run.fit(Plain(), Data(PREFERENCES))
    run.save_checkpoint(folder / "good.ckpt")
    return folder / "good.ckpt"


def flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


def weight(raw: bytes) -> bytes:
    """The numbers of a weight as they stand in the file."""
    return torch.load(io.BytesIO(raw), weights_only=True)["state_dict"]["layer.weight"].numpy().tobytes()


def pickled(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    return file.getvalue()


def safetensors(folder: Path) -> bytes:
    save_file({"w": torch.ones(2)}, folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw, _: b"", r"is empty \(0 bytes\)"),
        (lambda raw, _: raw[: len(raw) // 2], "truncated or damaged"),
        (lambda raw, _: raw[:-1], "truncated or damaged"),
        (lambda raw, _: raw[:3], "something else"),
        (lambda raw, _: flipped(raw, 8 * raw.index(b"layer.weight")), "damaged .*data.pkl"),
        (lambda raw, _: flipped(raw, 8 * raw.index(weight(raw)) + 3), "damaged .*data/"),
        (lambda raw, _: raw.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "damaged"),
        (lambda raw, _: raw[:500] + bytes(100) + raw[600:], "damaged"),
        (lambda raw, folder: safetensors(folder), "a safetensors file: name its folder"),
        (lambda raw, _: b"model: {class_path: a.b}\n", "no checkpoint, but something else"),
        (lambda raw, _: zipped(), "which torch.save always writes"),
        (lambda raw, _: pickled({"a": 1}, _use_new_zipfile_serialization=False), "before 1.6"),
        (lambda raw, _: pickled(nn.Linear(2, 1).state_dict()), "no state_dict .* something else wrote it"),
        (lambda raw, _: pickled([1, 2]), "no checkpoint of a Trainer"),
        (
            lambda raw, _: pickled({"state_dict": {}, "part": Path("a")}),
            "other things than tensors and plain data, such as a pathlib.*--weights_only",
        ),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused_by_path_with_the_good_one_beside_it(
    damage: object, message: str, good: Path, tmp_path: Path
) -> None:
    shutil.copy(good, tmp_path / "good.ckpt")
    path = tmp_path / "other.ckpt"
    path.write_bytes(damage(good.read_bytes(), tmp_path))
    expected = rf"--ckpt_path {path}: .*{message}.*newest good checkpoint beside it is {tmp_path}/good\.ckpt"
    for use in ("fit", "validate", "test", "predict"):
        with pytest.raises(UsageError, match=expected):
            getattr(trainer(tmp_path), use)(Plain(), datamodule=Data(PREFERENCES), ckpt_path=path, weights_only=True)
    run, module = trainer(tmp_path), Plain()
    run.strategy.connect(module)
    with pytest.raises(UsageError, match=expected):
        restore(run, module, path)


def test_every_flipped_bit_is_noticed_or_changes_nothing(good: Path, tmp_path: Path) -> None:
    raw, path = good.read_bytes(), tmp_path / "flipped.ckpt"
    expected = torch.load(good, weights_only=True)["state_dict"]
    bits = torch.randint(8 * len(raw), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    directory = 8 * raw.index(b"PK\x01\x02")
    noticed = 0
    for bit in [*bits, *range(directory, directory + 8 * 46)]:  # anywhere, and in a whole entry of the directory
        path.unlink(missing_ok=True)
        path.write_bytes(flipped(raw, bit))
        if problem(path):
            noticed += 1
        else:
            found = torch.load(path, weights_only=True)["state_dict"]
            assert all(torch.equal(found[name], weight) for name, weight in expected.items()), bit
    assert noticed > 100


def test_a_missing_file_and_folders_that_are_no_checkpoints(good: Path, tmp_path: Path) -> None:
    shutil.copy(good, tmp_path / "good.ckpt")
    with pytest.raises(MissingFileError, match=r"nowhere.ckpt: there is no such .* beside it is .*good.ckpt"):
        trainer(tmp_path).test(Plain(), datamodule=Data(PREFERENCES), ckpt_path=tmp_path / "nowhere.ckpt")
    (tmp_path / "link.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(MissingFileError, match="the link points to nothing"):
        trainer(tmp_path).test(Plain(), datamodule=Data(PREFERENCES), ckpt_path=tmp_path / "link.ckpt")
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="a folder without the files of a checkpoint"):
        trainer(tmp_path).fit(Plain(), Data(PREFERENCES), ckpt_path=tmp_path / "model")
    (tmp_path / "sharded.ckpt").mkdir()
    torch.save({}, tmp_path / "sharded.ckpt" / "meta.pt")
    with pytest.raises(UsageError, match=r"parts \(`.metadata`, `\*.distcp`\) are missing or empty"):
        trainer(tmp_path).fit(Plain(), Data(PREFERENCES), ckpt_path=tmp_path / "sharded.ckpt")


def test_training_does_not_go_on_from_weights_alone(good: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Plain(), Data(PREFERENCES))
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(
        UsageError, match=r"weights.ckpt: it holds weights only .*There is no good checkpoint beside it"
    ):
        trainer(tmp_path).fit(Plain(), Data(PREFERENCES), ckpt_path=tmp_path / "weights.ckpt")
    trainer(tmp_path).test(Plain(), Data(PREFERENCES), ckpt_path=tmp_path / "weights.ckpt", verbose=False)


def test_another_model_s_checkpoint_is_refused_by_path(good: Path, tmp_path: Path) -> None:
    class Wider(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

    with pytest.raises(UsageError, match=rf"{good} was written by another kind of model.*(?s:.*)layer.weight"):
        trainer(tmp_path).test(Wider(), Data(PREFERENCES), ckpt_path=good)
    run, module = trainer(tmp_path), Wider()
    run.strategy.connect(module)
    with pytest.raises(UsageError, match="another kind of model"):
        restore(run, module, good)


def test_a_module_is_not_loaded_from_a_damaged_file(good: Path, tmp_path: Path) -> None:
    class Own(RunModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"cut.ckpt: it is truncated or damaged"):
        Own.load_from_checkpoint(tmp_path / "cut.ckpt")
    assert torch.equal(Own.load_from_checkpoint(good).layer.weight, torch.load(good)["state_dict"]["layer.weight"])


def test_a_kill_while_a_checkpoint_is_written_leaves_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "system"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    run = trainer(tmp_path)
    run.fit(Plain(), Data(PREFERENCES))
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:

        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = shutil.move = die  # when all is written, and nothing is in its place
        run.save_checkpoint(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert list(temporary.rglob("*")) == []
    run.save_checkpoint(path)
    assert not path.with_name("last.ckpt.part").exists()


def test_a_full_disk_leaves_the_checkpoint_before_and_no_part(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    run.fit(Plain(), Data(PREFERENCES))
    run.save_checkpoint(tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_folder_that_a_kill_left_half_written_is_in_nobody_s_way(good: Path, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt.part").mkdir()
    (tmp_path / "a.ckpt.part" / "__0_0.distcp").write_bytes(b"half")
    run = trainer(tmp_path)
    run.fit(Plain(), Data(PREFERENCES))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert problem(tmp_path / "a.ckpt") is None and not list(tmp_path.glob("*.part"))


def test_checkpoints_can_be_written_in_the_background(tmp_path: Path) -> None:
    savers = [ModelCheckpoint(tmp_path, save_last=True)]
    trainer(tmp_path, enable_checkpointing=True, callbacks=savers, plugins=[AsyncCheckpointIO()]).fit(
        Plain(), Data(PREFERENCES)
    )
    assert sorted(path.name for path in tmp_path.glob("*.ckpt*")) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert problem(tmp_path / "last.ckpt", resume=True) is None


def test_a_monitored_run_removes_what_it_replaces(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    run = trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    run.fit(Plain(), Data(PREFERENCES))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["last.ckpt", "step=4.ckpt"]
