"""Checkpoint files on disk: integrity checks, error messages, and the run that a checkpoint belongs to.

``torch.save`` writes a zip archive with a CRC-32 of every record, which ``torch.load`` does not compare. Comparing them
reads the file once, about as fast as loading it, and detects every flipped bit that would change the loaded values.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moslim.utils.errors import MissingFileError, UsageError

RUN = "moslim_run"
"""Key of a checkpoint's entry about its run: ``version`` of its folder, or None, and ``started``, in seconds."""

GUARD_RECORD = "guard"
"""Key of a guard's record of the step that it kept."""

_VERSION, _STEP = re.compile(r"version_(\d+)", re.ASCII), re.compile(r"step[=_-]?(\d+)", re.ASCII)
_NEEDED = ("state_dict", "pytorch-lightning_version")
_TRAINING = ("loops", "optimizer_states", "lr_schedulers")
_ZIP, _CHUNK = b"PK\x03\x04", 1 << 22
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError),
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError),
    *(AssertionError, OverflowError, MemoryError, ImportError),
)
_checked: set[tuple[Any, ...]] = set()


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL, whose store checks what it holds."""
    return "://" in str(path)


def check_checkpoint(path: str | Path, weights_only: bool = True, resume: bool = False) -> None:
    """Raises an error if a checkpoint is not whole, or nothing that :class:`~moslim.training.MoslimTrainer` wrote.

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
    """Returns the fault of a checkpoint; None if it has none. Arguments as for :func:`check_checkpoint`."""
    if not path.exists():
        return "the link points to nothing" if path.is_symlink() else "there is no such checkpoint"
    if path.is_dir():
        return _folder_problem(path)
    wrong = _archive_problem(path)
    if wrong is not None or not weights_only:
        return wrong
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
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


def outline(path: Path) -> dict[Any, Any]:
    """Returns the contents of a checkpoint with stand-ins for tensors and objects; no code of it runs.

    Only its table is read, so that many large files cost little; of a folder, that of the part for it.

    Raises:
        UsageError: It cannot be read, or is no checkpoint.
    """
    if path.is_dir():
        path = next((part for part in (path / "meta.pt", *_deepspeed_parts(path)) if part.is_file()), path)
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = _Outline(io.BytesIO(archive.read(name))).load()
    except (StopIteration, *_UNREADABLE) as error:
        raise UsageError(f"{path} cannot be read: {_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no checkpoint")
    return content


class _StandIn:
    """In place of a tensor or an object, whatever is done to it."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__


class _Outline(pickle.Unpickler):
    """Reads plain data; of classes and functions it knows none."""

    def find_class(self, module: str, name: str) -> type:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _StandIn

    def persistent_load(self, pid: Any) -> None:
        """Leaves out the numbers of a tensor."""


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


@dataclass(frozen=True)
class _Noted:
    """Metadata of a checkpoint; None for what it lacks, or if it cannot be read."""

    path: Path
    version: int | None
    started: float | None
    step: int | None
    readable: bool
    by_guard: bool


def newest_first(paths: Iterable[Path], root: Path) -> list[tuple[float, Path]]:
    """Sorts checkpoints by version, start of the run, step, name and file time; leaves out what guards kept.

    A copy changes file times: they decide only between equal steps of one run, after the name, as ``last`` is written
    after the others. What cannot be read is taken for one of the newest run beside it, and without a step in its name
    for the end of that run, so that whoever takes the first that is good learns of what was before it.

    Args:
        paths: Checkpoints.
        root: The version is that of the folder ``version_N`` below, or else the one noted.

    Returns:
        Start of the run, in seconds (0 where unknown), and path of each.
    """
    noted = [found for found in (_noted(path, root) for path in paths) if not found.by_guard]
    newest = max((found.version for found in noted if found.version is not None), default=-1)
    starts: dict[int, float] = {}
    for found in noted:
        version = -1 if found.version is None else found.version
        starts[version] = max(starts.get(version, 0.0), found.started or 0.0)

    def order(found: _Noted) -> tuple[int, float, float, bool, int]:
        unknown = -1 if found.readable else newest
        version = unknown if found.version is None else found.version
        started = (0.0 if found.readable else starts[version]) if found.started is None else found.started
        step = (-1 if found.readable else math.inf) if found.step is None else found.step
        time = found.path.stat().st_mtime_ns if found.path.exists() else 0
        return version, started, step, found.path.stem.startswith("last"), time

    ordered = sorted(((order(found), found.path) for found in noted), reverse=True)
    return [(started, path) for (_, started, *_), path in ordered]


def _noted(path: Path, root: Path) -> _Noted:
    try:
        values = outline(path)
    except UsageError:
        values = {}
    run = values[RUN] if isinstance(values.get(RUN), dict) else {}
    version, started, step = run.get("version"), run.get("started"), values.get("global_step")
    folders = path.relative_to(root).parts[:-1]
    version = next((int(found[1]) for name in folders if (found := _VERSION.fullmatch(name))), version)
    if not isinstance(step, int):
        named = _STEP.search(path.stem)
        step = int(named[1]) if named else None
    return _Noted(
        path,
        version if isinstance(version, int) else None,
        float(started) if isinstance(started, (int, float)) else None,
        step,
        bool(values),
        GUARD_RECORD in values,
    )


def _beside(path: Path, weights_only: bool, resume: bool) -> str:
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.exists()]
    for _, other in newest_first(others, path.parent):
        if problem(other, weights_only, resume) is None:
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
