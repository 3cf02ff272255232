"""Atomic export of models to folders, and verification of their checksums.

An export is written to a temporary folder and then replaces an earlier one by renames that a journal
(``.exchange.json``) lists first. If the writer is killed, the next process that opens the folder completes the
exchange. ``config.json`` is removed first and added last, so that readers that ignore the journal find no model during
the exchange, rather than a mixture of two.
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
"""File with the size and CRC-32 of each file of an export, except those that users edit."""

_PART, _NEW, _OLD = ".part-", "new", "old"
_JOURNAL = ".exchange.json"
_CONFIG = "config.json"  # removed first and added last
_EDITABLE = ("README.md", "predict.yaml")
_CHUNK = 1 << 22
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "backbone/",
    "adapter/",
)
_crc32_cache: dict[tuple[int, ...], int] = {}


@contextmanager
def whole_folder(folder: Path, is_alike: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a temporary folder for a model; its content is moved to ``folder`` at the end, or deleted on an error.

    Weights and tokenizer of an earlier export are removed, since they could be loaded with the new ones or instead of
    them. Other files are kept.

    Args:
        folder: Folder of the model.
        is_alike: Function that tells whether an existing model in ``folder`` may be replaced.

    Raises:
        UsageError: The existing model may not be replaced, or a file is in the way.
    """
    finish_exchange(folder)
    if (folder / _CONFIG).exists() and not is_alike(folder):
        raise UsageError(f"'{folder}' holds another model, which would be lost: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"'{folder}' cannot be a folder, as it or what it lies in is a file: name another") from None
    for abandoned in folder.glob(f"{_PART}*"):  # by a killed process
        shutil.rmtree(abandoned)
    part = Path(mkdtemp(prefix=_PART, dir=folder))
    try:
        for name in (_NEW, _OLD):
            (part / name).mkdir()
        yield part / _NEW
        _write_checksums(part / _NEW)
        _exchange(folder, part)
    except BaseException:
        if not (folder / _JOURNAL).exists():  # otherwise the next process completes the exchange
            shutil.rmtree(part, ignore_errors=True)
        raise


def finish_exchange(source: str | Path) -> None:
    """Completes an interrupted exchange of an exported folder, if there is one.

    Args:
        source: The folder, or a folder inside it; Hub names are ignored.

    Raises:
        UsageError: The exchange cannot be completed; the message says what to do.
    """
    for folder in (Path(source), Path(source).parent):
        if not (folder / _JOURNAL).is_file():
            continue
        try:
            with _locked(folder / _JOURNAL) as journal:
                if journal is not None:
                    _rename_files(folder, *_parse_journal(journal))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"an export into '{folder}' was interrupted while it took the place of an earlier one, and could not "
                f"be finished now ({error}). Load it once as a user who may write there, or delete {_JOURNAL} and "
                "export it anew"
            ) from error


def check_files(source: str | Path) -> None:
    """Verifies the checksums of an exported folder, or of a folder inside it; does nothing if there are none.

    Files that were verified before and have not changed since are not read again. Files other than weights may be
    edited, so that a difference gives a warning only.

    Raises:
        UsageError: Weights are missing or differ from their checksum.
    """
    for folder, prefix in ((Path(source), ""), (Path(source).parent, f"{Path(source).name}/")):
        is_export = not prefix or (folder / _CONFIG).is_file()
        checksums = _read_checksums(folder / CHECKSUMS) if is_export and (folder / CHECKSUMS).is_file() else {}
        for name, expected in checksums.items():
            if not name.startswith(prefix):
                continue
            file = folder / name
            difference = _difference(file, expected)
            if difference is None:
                continue
            if file.suffix == ".safetensors":
                raise UsageError(
                    f"'{file}' {difference}: the disk or a copy has damaged it, or something else wrote it. Copy the "
                    f"folder again, or export it anew; if the change is meant, delete '{folder / CHECKSUMS}'"
                )
            warn(
                f"'{file}' {difference}: it was edited, or is damaged. If the change is meant, "
                f"delete '{folder / CHECKSUMS}'"
            )


def refuse_sources(folder: str | Path, sources: Mapping[str, str | None]) -> None:
    """Checks that an export does not overwrite a model that the run reads.

    Args:
        folder: Folder of the export.
        sources: Folders and Hub names that the run reads, by option.

    Raises:
        UsageError: A source lies in the folder.
    """
    for option, source in sources.items():
        if source is not None and Path(source).resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"'{folder}' holds {option} = '{source}', which this run needs: name another folder")


def _exchange(folder: Path, part: Path) -> None:
    new = sorted((path.name for path in (part / _NEW).iterdir()), key=lambda name: name == _CONFIG)
    exported: set[str] = set()
    if (folder / CHECKSUMS).is_file():
        with suppress(UsageError):  # a damaged file is replaced
            exported = {Path(name).parts[0] for name in _read_checksums(folder / CHECKSUMS)}
    replaced = {path.name for pattern in _MODEL_FILES for path in folder.glob(pattern)} | exported | set(new)
    old = sorted((name for name in replaced if (folder / name).exists()), key=lambda name: name != _CONFIG)
    with _locked(part / _JOURNAL, {"part": part.name, "old": old, "new": new}):
        os.replace(part / _JOURNAL, folder / _JOURNAL)
        _rename_files(folder, part.name, old, new)


def _rename_files(folder: Path, part: str, old: list[str], new: list[str]) -> None:
    """Makes the remaining renames of an exchange; the content of the folders shows which ones are done."""
    for name in old:
        if not os.path.lexists(folder / part / _OLD / name):
            os.replace(folder / name, folder / part / _OLD / name)
    for name in new:
        if os.path.lexists(folder / part / _NEW / name):
            os.replace(folder / part / _NEW / name, folder / name)
    (folder / _JOURNAL).unlink()
    shutil.rmtree(folder / part)


def _parse_journal(content: Any) -> tuple[str, list[str], list[str]]:
    """Returns temporary folder, old and new files of a journal; refuses names outside of the folder."""
    part, old, new = content["part"], content["old"], content["new"]
    for name in (part, *old, *new):
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{_JOURNAL} holds {name!r}")
    if not part.startswith(_PART):
        raise ValueError(f"{_JOURNAL} holds {part!r}")
    return part, old, new


@contextmanager
def _locked(journal: Path, content: dict[str, Any] | None = None) -> Iterator[Any]:
    """Locks a journal, so that no other process completes the exchange of a running writer.

    Args:
        journal: Path of the journal.
        content: Content to write; None to read it.

    Yields:
        Content of the journal; None if it is gone, since its writer has finished.
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


def _write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    checksums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in files
        if path.name not in _EDITABLE
    }
    (folder / CHECKSUMS).write_text(json.dumps({"files": checksums}, indent=1) + "\n", encoding="utf-8")


def _read_checksums(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        is_ours = isinstance(content, dict) and "files" in content  # another tool may use the same file name
        files = content["files"] if is_ours else {}
        for name in files:
            if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is no file of the folder")
        return {name: {"bytes": int(values["bytes"]), "crc32": int(values["crc32"])} for name, values in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"'{file}' is damaged: copy the folder again, or delete the file to load it unchecked"
        ) from error


def _difference(file: Path, expected: Mapping[str, int]) -> str | None:
    """Description of the difference between a file and its checksum; None if there is none."""
    if not file.is_file():
        return f"is missing, which {CHECKSUMS} lists"
    size = file.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes instead of the {expected['bytes']} that {CHECKSUMS} lists"
    return None if _crc32(file) == expected["crc32"] else f"is not what was exported ({CHECKSUMS})"


def _crc32(file: Path) -> int:
    status = file.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)  # unchanged by renames
    if key not in _crc32_cache:
        checksum = 0
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                checksum = zlib.crc32(chunk, checksum)
        _crc32_cache[key] = checksum
    return _crc32_cache[key]
