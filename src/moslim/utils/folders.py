"""Folders of models: each appears whole, is compared with its checksums, and none takes the place of a model in use.

An export is written beside its files and then exchanged for an earlier one, by renames that a journal lists first
(``.exchange.json``). Whoever finds a journal whose writer was killed finishes the exchange. ``config.json`` goes first
and comes last, so that what knows nothing of the journal finds no model meanwhile, rather than a mixture of two.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from moslim.training.distributed import warn
from moslim.utils.errors import UsageError

CHECKSUMS = "checksums.json"
"""File of an exported folder with size and CRC-32 of each of the others, but for those that people complete."""

_PART, _NEW, _OLD = ".part-", "new", "old"
_JOURNAL = ".exchange.json"
_FIRST = "config.json"  # of what an exchange takes away; and the last that it puts there
_FOR_PEOPLE = ("README.md", "predict.yaml")
_CHUNK = 1 << 22
_EARLIER = (
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "backbone/",
    "adapter/",
)
_computed: dict[tuple[int, ...], int] = {}


@contextmanager
def whole_folder(folder: Path, is_alike: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a folder to write a model to, whose content is moved to its place in the end, or is lost on an error.

    Weights and tokenizer of an earlier export go: they would be loaded with the new ones, or instead of them. Files of
    other names stay.

    Args:
        folder: Where the model is to be.
        is_alike: Whether a model that is there already is of the same kind.

    Raises:
        UsageError: It is not, or a file is in the way.
    """
    finish_exchange(folder)
    if (folder / _FIRST).exists() and not is_alike(folder):
        raise UsageError(f"'{folder}' holds another model, which would be lost: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"'{folder}' cannot be a folder, as it or what it lies in is a file: name another") from None
    for left in folder.glob(f"{_PART}*"):  # by a process that was killed
        shutil.rmtree(left)
    part = Path(mkdtemp(prefix=_PART, dir=folder))
    try:
        for name in (_NEW, _OLD):
            (part / name).mkdir()
        yield part / _NEW
        _note_checksums(part / _NEW)
        _exchange(folder, part)
    except BaseException:
        if not (folder / _JOURNAL).exists():  # else it is finished by the next one who comes
            shutil.rmtree(part, ignore_errors=True)
        raise


def finish_exchange(source: str | Path) -> None:
    """Finishes the exchange of an exported folder for another that a kill interrupted, if there is one.

    Args:
        source: The folder, or one inside it; Hub names are none.

    Raises:
        UsageError: It cannot be finished. The message says what happened and what to do.
    """
    for folder in (Path(source), Path(source).parent):
        if not (folder / _JOURNAL).is_file():
            continue
        try:
            with _locked(folder / _JOURNAL) as journal:
                if journal is not None:
                    _renames(folder, *_plan(journal))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"an export into '{folder}' was interrupted while it took the place of an earlier one, and could not "
                f"be finished now ({error}). Load it once as a user who may write there, or delete {_JOURNAL} and "
                "export it anew"
            ) from error


def check_files(source: str | Path) -> None:
    """Compares an exported folder, or one inside it, with its checksums, where it has some.

    It reads each file once; those that were compared, and have not changed since, are not read again.

    Raises:
        UsageError: Weights are missing, or not as they were written. Other files that differ, which people may edit,
            are warned of.
    """
    for folder, inside in ((Path(source), ""), (Path(source).parent, f"{Path(source).name}/")):
        is_export = not inside or (folder / _FIRST).is_file()
        noted = _noted(folder / CHECKSUMS) if is_export and (folder / CHECKSUMS).is_file() else {}
        for name, values in noted.items():
            if not name.startswith(inside):
                continue
            file = folder / name
            wrong = _difference(file, values)
            if wrong is None:
                continue
            if file.suffix == ".safetensors":
                raise UsageError(
                    f"'{file}' {wrong}: the disk or a copy has damaged it, or something else wrote it. Copy the folder "
                    f"again, or export it anew; if the change is meant, delete '{folder / CHECKSUMS}'"
                )
            warn(
                f"'{file}' {wrong}: it was edited, or is damaged. If the change is meant, delete '{folder / CHECKSUMS}'"
            )


def refuse_sources(folder: str | Path, sources: Mapping[str, str | None]) -> None:
    """Raises a ValueError where an export would take the place of what the run is built on.

    Args:
        folder: Where the export would go.
        sources: Folders and Hub names that the run reads, by option.
    """
    for option, source in sources.items():
        if source is not None and Path(source).resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"'{folder}' holds {option} = '{source}', which this run needs: name another folder")


def _exchange(folder: Path, part: Path) -> None:
    new = sorted((path.name for path in (part / _NEW).iterdir()), key=lambda name: name == _FIRST)
    listed: set[str] = set()
    if (folder / CHECKSUMS).is_file():
        with suppress(UsageError):  # damaged, and replaced now
            listed = {Path(name).parts[0] for name in _noted(folder / CHECKSUMS)}
    earlier = {path.name for pattern in _EARLIER for path in folder.glob(pattern)} | listed | set(new)
    old = sorted((name for name in earlier if (folder / name).exists()), key=lambda name: name != _FIRST)
    with _locked(part / _JOURNAL, {"part": part.name, "old": old, "new": new}):
        os.replace(part / _JOURNAL, folder / _JOURNAL)
        _renames(folder, part.name, old, new)


def _renames(folder: Path, part: str, old: list[str], new: list[str]) -> None:
    """Does what is left of an exchange; each rename is done or not, and which are shows in the folders."""
    for name in old:
        if not os.path.lexists(folder / part / _OLD / name):
            os.replace(folder / name, folder / part / _OLD / name)
    for name in new:
        if os.path.lexists(folder / part / _NEW / name):
            os.replace(folder / part / _NEW / name, folder / name)
    (folder / _JOURNAL).unlink()
    shutil.rmtree(folder / part)


def _plan(content: Any) -> tuple[str, list[str], list[str]]:
    """Reads a journal, which must not move anything out of its folder or into it."""
    part, old, new = content["part"], content["old"], content["new"]
    for name in (part, *old, *new):
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{_JOURNAL} holds {name!r}")
    if not part.startswith(_PART):
        raise ValueError(f"{_JOURNAL} holds {part!r}")
    return part, old, new


@contextmanager
def _locked(journal: Path, content: dict[str, Any] | None = None) -> Iterator[Any]:
    """Holds a journal alone, so that nobody finishes what its writer, who lives, is doing.

    Args:
        journal: The file.
        content: Written to it; None to read it.

    Yields:
        What it holds; None if it is gone since, as its writer has finished.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        fcntl = None  # type: ignore[assignment]
    while True:
        try:
            file = journal.open("r+" if content is None else "w", encoding="utf-8")
        except FileNotFoundError:
            yield None
            return
        with file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if not os.path.samestat(os.fstat(file.fileno()), journal.stat()):
                    continue
            if content is None:
                text = file.read()
                yield json.loads(text) if journal.exists() else None
            else:
                json.dump(content, file)
                file.flush()
                yield content
            return


def _note_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    noted = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in files
        if path.name not in _FOR_PEOPLE
    }
    (folder / CHECKSUMS).write_text(json.dumps({"files": noted}, indent=1) + "\n", encoding="utf-8")


def _noted(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = content["files"] if isinstance(content, dict) and "files" in content else {}  # else somebody else's
        for name in files:
            if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is no file of the folder")
        return {name: {"bytes": int(values["bytes"]), "crc32": int(values["crc32"])} for name, values in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"'{file}' is damaged: copy the folder again, or delete the file to load it unchecked"
        ) from error


def _difference(file: Path, values: Mapping[str, int]) -> str | None:
    if not file.is_file():
        return f"is missing, which {CHECKSUMS} lists"
    size = file.stat().st_size
    if size != values["bytes"]:
        return f"has {size} bytes instead of the {values['bytes']} that {CHECKSUMS} lists"
    return None if _crc32(file) == values["crc32"] else f"is not what was exported ({CHECKSUMS})"


def _crc32(file: Path) -> int:
    state = file.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)  # a rename changes none of them
    if key not in _computed:
        found = 0
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                found = zlib.crc32(chunk, found)
        _computed[key] = found
    return _computed[key]
