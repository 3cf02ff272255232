"""Checkpoint files as they lie on disk: whether one is whole, what is wrong with it, and what it says of its run.

``torch.save`` writes a zip archive with a CRC-32 of every record, which ``torch.load`` does not compare. Comparing them
reads the file once, about as fast as loading it, and notices every flipped bit that would change what is loaded.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moslim.errors import MissingFileError, UsageError

RUN = "moslim_run"
"""Key of what a checkpoint says of its run: ``version`` of its folder, or None, and ``started``, in seconds."""

GUARD_RECORD = "guard"
"""Key of what a guard noted of the step that it kept."""

_VERSION, _STEP = re.compile(r"version_(\d+)", re.ASCII), re.compile(r"step[=_-]?(\d+)", re.ASCII)
_NEEDED = ("state_dict", "pytorch-lightning_version")
_TRAINING = ("loops", "optimizer_states", "lr_schedulers")
_ZIP, _CHUNK = b"PK\x03\x04", 1 << 22
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError),
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError),
)
_checked: set[tuple[Any, ...]] = set()


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL, whose store checks what it holds."""
    return "://" in str(path)


def check_checkpoint(path: str | Path, weights_only: bool = True, resume: bool = False) -> None:
    """Raises an error if a checkpoint is not whole, or nothing that :class:`~moslim.trainer.MoslimTrainer` wrote.

    A file that was found whole is not read again while it stays as it is. Of a checkpoint that is a folder, as FSDP and
    DeepSpeed write them, the parts that ``torch.save`` wrote are read; the others (``*.distcp``) must not be empty.

    Args:
        path: File or folder; a URL is not looked at.
        weights_only: Whether it must hold tensors and plain data only.
        resume: Whether training goes on from it, so that it must hold more than weights.

    Raises:
        MissingFileError: There is none.
        UsageError: It is empty, truncated, damaged or something else. The message names the newest good one beside it.
    """
    if is_remote(path):
        return
    path = Path(path)
    wrong = problem(path, weights_only, resume)
    if wrong is None:
        return
    kind = UsageError if path.exists() else MissingFileError
    raise kind(f"--ckpt_path {path}: {wrong}. {_beside(path, weights_only, resume)}")


def problem(path: Path, weights_only: bool = True, resume: bool = False) -> str | None:
    """What is wrong with a checkpoint; None if nothing is. Arguments as for :func:`check_checkpoint`."""
    if not path.exists():
        return "the link points to nothing" if path.is_symlink() else "there is no such checkpoint"
    if path.is_dir():
        return _folder_problem(path)
    wrong = _archive_problem(path)
    if wrong is not None or not weights_only:
        return wrong
    try:
        content = peek(path)
    except pickle.UnpicklingError as error:
        return (
            f"it holds other things than tensors and plain data{_classes(error)}. If you trust who wrote it, "
            "--weights_only false loads it where the command has that option, and runs the code in it"
        )
    except _UNREADABLE as error:
        return f"it is damaged ({_line(error)})"
    missing = [key for key in _NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        return f"it is no checkpoint of a Trainer: it has no {' and no '.join(missing)}; something else wrote it"
    if resume and not all(key in content for key in _TRAINING):
        return "it holds weights only (save_weights_only), so that no training can go on from it"
    return None


def peek(path: Path) -> Any:
    """What a checkpoint holds, whose tensors are not read before they are used; of a folder, its part for that.

    Raises:
        UnpicklingError: It holds other things than tensors and plain data.
        OSError: It cannot be read. Damaged, it can raise almost anything.
    """
    if path.is_dir():
        path = next((part for part in (path / "meta.pt", *_deepspeed_parts(path)) if part.is_file()), path)
    return torch.load(path, mmap=True, map_location="cpu", weights_only=True)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Says which checkpoint is meant where loading one, or giving it to a model, fails.

    Raises:
        UsageError: What was raised within, if it is the checkpoint's fault.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"--ckpt_path {path}: it holds other things than tensors and plain data{_classes(error)}"
        ) from error
    except _UNREADABLE as error:
        raise UsageError(f"--ckpt_path {path} cannot be loaded: {type(error).__name__}: {_line(error)}") from error


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Says which checkpoint is meant where its weights have no place in the model.

    Raises:
        UsageError: Names or shapes differ.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UsageError(
            f"--ckpt_path {path} was written by another kind of model, or with other options: give the config that it "
            f"was trained with. {str(error)[:1000]}"
        ) from error


def _archive_problem(path: Path) -> str | None:
    state = path.stat()
    if state.st_size == 0:
        return "it is empty (0 bytes): the disk was full, or a copy was broken off"
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino)
    if key in _checked:
        return None
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if not start.startswith(_ZIP) and not zipfile.is_zipfile(path):
            return f"it is no checkpoint, but {_kind(start)}"
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "it is a zip archive without `data.pkl`, so nothing that torch.save wrote"
            for record in archive.infolist():
                if record.external_attr or record.compress_type or record.file_size != record.compress_size:
                    return f"it is damaged: the entry of `{record.filename}` is none that torch.save writes"
                with archive.open(record) as content:  # compares the checksum at the end
                    while content.read(_CHUNK):
                        pass
    except zipfile.BadZipFile as error:
        if "not a zip file" in str(error):
            return f"it is truncated or damaged: what must stand at its end is missing (it has {state.st_size} bytes)"
        return f"it is damaged ({_line(error)})"
    except PermissionError as error:
        return f"it cannot be read ({error.strerror})"
    except _UNREADABLE as error:
        return f"it is damaged ({_line(error)})"
    _checked.add(key)
    return None


def _folder_problem(path: Path) -> str | None:
    """Of a checkpoint that is a folder."""
    sharded, parts = (path / "meta.pt").is_file(), _deepspeed_parts(path)
    if sharded:
        shards = list(path.glob("*.distcp"))
        if not (path / ".metadata").is_file() or not shards or not all(shard.stat().st_size for shard in shards):
            return "its parts (`.metadata`, `*.distcp`) are missing or empty"
        parts = [path / "meta.pt"]
    elif not parts:
        return "it is a folder without the files of a checkpoint; a folder of a model is named in the config instead"
    for part in parts:
        wrong = _archive_problem(part)
        if wrong is not None:
            return f"{part.name}: {wrong}"
    return None


def _deepspeed_parts(path: Path) -> list[Path]:
    return sorted(path.glob("checkpoint/*.pt"))


def run_order(path: Path, root: Path) -> tuple[int, float, int, bool, int]:
    """What checkpoints are sorted by, the newest last: version, start of the run, step, name, and file time.

    A copy changes file times: they decide only between equal steps of one run, after the name, as ``last`` is written
    after the others.

    Args:
        path: A checkpoint; damaged, only its names count.
        root: The version is that of the folder ``version_N`` below, or else the one noted; -1 where neither says.
    """
    try:
        content = peek(path)
    except _UNREADABLE:
        content = None
    content = content if isinstance(content, dict) else {}
    run = content[RUN] if isinstance(content.get(RUN), dict) else {}
    noted, started, step = run.get("version"), run.get("started"), content.get("global_step")
    folders = path.relative_to(root).parts[:-1]
    version = next((int(found[1]) for name in folders if (found := _VERSION.fullmatch(name))), noted)
    if not isinstance(step, int):
        named = _STEP.search(path.stem)
        step = int(named[1]) if named else -1
    return (
        version if isinstance(version, int) else -1,
        float(started) if isinstance(started, (int, float)) else 0.0,
        step,
        path.stem.startswith("last"),
        path.stat().st_mtime_ns if path.exists() else 0,
    )


def is_guards(path: Path) -> bool:
    """Whether a guard kept a checkpoint, whose step must not be gone on from."""
    try:
        content = peek(path)
    except _UNREADABLE:
        return False
    return isinstance(content, dict) and GUARD_RECORD in content


def _beside(path: Path, weights_only: bool, resume: bool) -> str:
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.exists()]
    for other in sorted(others, key=lambda other: run_order(other, path.parent), reverse=True):
        if not is_guards(other) and problem(other, weights_only, resume) is None:
            return f"The newest good checkpoint beside it is {other}"
    return "There is no good checkpoint beside it"


def _kind(start: bytes) -> str:
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "a safetensors file: name its folder in the config instead"
    if start.startswith(b"\x80"):
        return (
            "a pickle, perhaps in the format of torch before 1.6, which has no checksums: save it anew with torch.save"
        )
    return f"something else (it begins with {start!r})"


def _classes(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f", such as a {found[1]}" if found else ""


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
