"""Checkpoint files on disk: integrity checks, error messages, and sorting by run and step.

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
"""Key of a checkpoint's entry about its run: ``version`` of its folder (or None) and ``started`` (Unix time in s)."""

GUARD_RECORD = "guard"
"""Key of a checkpoint's entry by a guard about the step that tripped it."""

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
    """Whether a path is a URL."""
    return "://" in str(path)


def check_checkpoint(path: str | Path, weights_only: bool = True, resume: bool = False) -> None:
    """Raises an error if a checkpoint is damaged, or was not written by a Trainer.

    A file that passed the check is not read again until it changes. Of a checkpoint that is a folder, as FSDP and
    DeepSpeed write them, the parts that ``torch.save`` wrote are read; the others (``*.distcp``) must not be empty.

    Args:
        path: File or folder; a URL is not checked, since its store checks the content.
        weights_only: Whether it must hold tensors and plain data only.
        resume: Whether training resumes from it, so that it must hold more than weights.

    Raises:
        MissingFileError: The checkpoint does not exist.
        UsageError: It is empty, truncated, damaged or no checkpoint. The message names the newest good checkpoint in
            its folder.
    """
    if is_remote(path):
        return
    path = Path(path)
    fault = problem(path, weights_only, resume)
    if fault is None:
        return
    error_class = UsageError if path.exists() else MissingFileError
    raise error_class(f"--ckpt_path {path}: {fault}. {_newest_good_beside(path, weights_only, resume)}")


def problem(path: Path, weights_only: bool = True, resume: bool = False) -> str | None:
    """Returns the fault of a checkpoint; None if it has none. Arguments as for :func:`check_checkpoint`."""
    if not path.exists():
        return "the link points to nothing" if path.is_symlink() else "there is no such checkpoint"
    if path.is_dir():
        return _folder_problem(path)
    fault = _archive_problem(path)
    if fault is not None or not weights_only:
        return fault
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return (
            f"it holds other things than tensors and plain data{_refused_class(error)}. If you trust who wrote it, "
            "load it with --weights_only false, where the command has that option; this runs the code in it"
        )
    except _UNREADABLE as error:
        return f"it is damaged ({_first_line(error)})"
    missing = [key for key in _NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        return f"it is no checkpoint of a Trainer: it has no {' and no '.join(missing)}; something else wrote it"
    if resume and not all(key in content for key in _TRAINING):
        return "it holds weights only (save_weights_only), so that training cannot resume from it"
    return None


def outline(path: Path) -> dict[Any, Any]:
    """Returns the content of a checkpoint with stand-ins for tensors and objects; no code in it runs.

    Reads only the pickle without the tensors, so that many large files are fast to read. Of a folder, it reads the part
    with the metadata.

    Raises:
        UsageError: The file cannot be read, or is no checkpoint.
    """
    if path.is_dir():
        path = next((part for part in (path / "meta.pt", *_deepspeed_parts(path)) if part.is_file()), path)
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = _Outline(io.BytesIO(archive.read(name))).load()
    except (StopIteration, *_UNREADABLE) as error:
        raise UsageError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return content


class _StandIn:
    """Placeholder for a tensor or an object; accepts every call that an unpickler makes."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__


class _Outline(pickle.Unpickler):
    """Unpickler that replaces all classes and functions by :class:`_StandIn`."""

    def find_class(self, module: str, name: str) -> type:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _StandIn

    def persistent_load(self, pid: Any) -> None:
        """Returns None in place of the storage of a tensor."""


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Context that converts errors of loading a checkpoint to a :class:`UsageError` with its path.

    Raises:
        UsageError: The file cannot be read or unpickled.
    """
    try:
        yield
    except (UsageError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"--ckpt_path {path}: it holds other things than tensors and plain data{_refused_class(error)}"
        ) from error
    except _UNREADABLE as error:
        raise UsageError(
            f"--ckpt_path {path} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Context that converts a mismatch of weights and model to a :class:`UsageError` with the checkpoint's path.

    Raises:
        UsageError: Names or shapes of the weights differ from those of the model.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UsageError(
            f"--ckpt_path {path} was written by another kind of model, or with other options: give the config of its "
            f"training. {str(error)[:1000]}"
        ) from error


def _archive_problem(path: Path) -> str | None:
    status = path.stat()
    if status.st_size == 0:
        return "it is empty (0 bytes): the disk was full, or a copy was interrupted"
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
    if key in _checked:
        return None
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if not start.startswith(_ZIP) and not zipfile.is_zipfile(path):
            return f"it is no checkpoint, but {_file_type(start)}"
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "it is a zip archive without `data.pkl`, which torch.save always writes"
            for record in archive.infolist():
                if record.external_attr or record.compress_type or record.file_size != record.compress_size:
                    return f"it is damaged: torch.save does not write an entry such as that of `{record.filename}`"
                with archive.open(record) as content:  # compares the checksum at the end
                    while content.read(_CHUNK):
                        pass
    except zipfile.BadZipFile as error:
        if "not a zip file" in str(error):
            return f"it is truncated or damaged: the directory at its end is missing (it has {status.st_size} bytes)"
        return f"it is damaged ({_first_line(error)})"
    except PermissionError as error:
        return f"it cannot be read ({error.strerror})"
    except _UNREADABLE as error:
        return f"it is damaged ({_first_line(error)})"
    _checked.add(key)
    return None


def _folder_problem(path: Path) -> str | None:
    """Returns the fault of a checkpoint that is a folder (FSDP, DeepSpeed); None if it has none."""
    sharded, parts = (path / "meta.pt").is_file(), _deepspeed_parts(path)
    if sharded:
        shards = list(path.glob("*.distcp"))
        if not (path / ".metadata").is_file() or not shards or not all(shard.stat().st_size for shard in shards):
            return "its parts (`.metadata`, `*.distcp`) are missing or empty"
        parts = [path / "meta.pt"]
    elif not parts:
        return "it is a folder without the files of a checkpoint; to load the folder of a model, name it in the config"
    for part in parts:
        fault = _archive_problem(part)
        if fault is not None:
            return f"{part.name}: {fault}"
    return None


def _deepspeed_parts(path: Path) -> list[Path]:
    return sorted(path.glob("checkpoint/*.pt"))


@dataclass(frozen=True)
class _Metadata:
    """Run and step of a checkpoint; None for values that it lacks, or if it cannot be read."""

    path: Path
    version: int | None
    started: float | None
    step: int | None
    readable: bool
    kept_by_guard: bool


def newest_first(paths: Iterable[Path], root: Path) -> list[tuple[float, Path]]:
    """Sorts checkpoints by version, start of the run, step, name and file time; omits those that guards kept.

    File times change in a copy, so they are compared last; before them, ``last`` sorts above other names, since it is
    written after them. An unreadable checkpoint is assigned to the newest run in its folder and, without a step in its
    name, to the end of that run, so that a caller who takes the first good checkpoint can report it.

    Args:
        paths: Checkpoints.
        root: Folder above them. The version is that of a folder ``version_N`` between the two, or else the recorded
            one.

    Returns:
        Start of the run (Unix time in seconds, 0 if unknown) and path of each checkpoint, newest first.
    """
    everything = (_read_metadata(path, root) for path in paths)
    checkpoints = [metadata for metadata in everything if not metadata.kept_by_guard]
    newest_version = max((metadata.version for metadata in checkpoints if metadata.version is not None), default=-1)
    starts: dict[int, float] = {}
    for metadata in checkpoints:
        version = -1 if metadata.version is None else metadata.version
        starts[version] = max(starts.get(version, 0.0), metadata.started or 0.0)

    def order(metadata: _Metadata) -> tuple[int, float, float, bool, int]:
        readable, path = metadata.readable, metadata.path
        default_version = -1 if readable else newest_version
        version = default_version if metadata.version is None else metadata.version
        started = (0.0 if readable else starts[version]) if metadata.started is None else metadata.started
        step = (-1 if readable else math.inf) if metadata.step is None else metadata.step
        file_time = path.stat().st_mtime_ns if path.exists() else 0
        return version, started, step, path.stem.startswith("last"), file_time

    ordered = sorted(((order(metadata), metadata.path) for metadata in checkpoints), reverse=True)
    return [(started, path) for (_, started, *_), path in ordered]


def _read_metadata(path: Path, root: Path) -> _Metadata:
    try:
        content = outline(path)
    except UsageError:
        content = {}
    run = content[RUN] if isinstance(content.get(RUN), dict) else {}
    version, started, step = run.get("version"), run.get("started"), content.get("global_step")
    folders = path.relative_to(root).parts[:-1]
    version = next((int(match[1]) for name in folders if (match := _VERSION.fullmatch(name))), version)
    if not isinstance(step, int):
        step_match = _STEP.search(path.stem)
        step = int(step_match[1]) if step_match else None
    return _Metadata(
        path,
        version=version if isinstance(version, int) else None,
        started=float(started) if isinstance(started, (int, float)) else None,
        step=step,
        readable=bool(content),
        kept_by_guard=GUARD_RECORD in content,
    )


def _newest_good_beside(path: Path, weights_only: bool, resume: bool) -> str:
    """Returns a sentence that names the newest good checkpoint in the same folder."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.exists()]
    for _, other in newest_first(others, path.parent):
        if problem(other, weights_only, resume) is None:
            return f"The newest good checkpoint beside it is {other}"
    return "There is no good checkpoint beside it"


def _file_type(start: bytes) -> str:
    """Describes a file that is no checkpoint, by its first 9 bytes."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "a safetensors file: name its folder in the config instead"
    if start.startswith(b"\x80"):
        return (
            "a pickle, perhaps in the format of torch before 1.6, which has no checksums: save it again with torch.save"
        )
    return f"something else (it begins with {start!r})"


def _refused_class(error: pickle.UnpicklingError) -> str:
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f", such as a {match[1]}" if match else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
