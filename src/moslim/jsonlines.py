"""A file of records that is either whole or not there, and can be gone on with where its writer was interrupted."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_warn

from moslim.errors import UsageError
from moslim.utils.files import write_text


class JsonLines:
    """Writes records to ``<name>.part``, batch by batch; :meth:`close` gives the file its name.

    Beside it lies ``<name>.part.json``, which says what the records depend on.

    Args:
        path: Where the file shall be.
        depends_on: What the records depend on, as plain data; see :func:`unfinished`.
        keep: Records of an interrupted writer to go on after; what it wrote behind them is lost.

    Raises:
        UsageError: Another process is writing the file.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any] | None = None, keep: int = 0) -> None:
        self.path = path
        self._part, self._note = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("r+b" if self._part.exists() else "w+b")
        if not _lock(self._file):
            raise UsageError(f"{self._part}: another process is writing it; wait for it, or name another file")
        if not keep:
            self._file.truncate(0)  # never old records beside a new note
            write_text(self._note, json.dumps(depends_on or {}, indent=1))
        for _ in range(keep):
            self._file.readline()
        self._file.truncate()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records, and leaves none of them in memory."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()

    def stop(self) -> None:
        """Leaves what is written to be gone on with."""
        self._file.close()

    def close(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        os.replace(self._part, self.path)
        self._note.unlink()


def unfinished(path: Path, depends_on: dict[str, Any], quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the whole records that an interrupted writer left of a file.

    None, with a warning, if they depend on anything else, or the note of what they depend on is damaged.

    Args:
        path: The file's place when it is complete.
        depends_on: What its records depend on now, as given to :class:`JsonLines`.
        quiet: Whether to leave the warning out.
    """
    part, note = _beside(path)
    if not part.exists():
        return
    now = json.loads(json.dumps(depends_on))
    try:
        before = _record(note.read_bytes()) if note.exists() else {}
    except ValueError:
        _warn(f"{note}, which says what {part} depends on, is damaged: starting anew", quiet)
        return
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        _warn(f"{part} was written with another {' and '.join(changed)}: starting anew", quiet)
        return
    with part.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = _record(line)
            except ValueError:  # a machine that loses power can leave anything at the end of a file
                return
            yield record


def finished(path: Path, depends_on: dict[str, Any], rows: Iterable[Mapping[str, Any]], quiet: bool = False) -> int:
    """Returns how many rows at the start have a record in what an interrupted writer left.

    What it left is compared with the rows one by one: 0, with a warning, if they differ anywhere.

    Args:
        path: The file's place when it is complete.
        depends_on: What records depend on besides the rows.
        rows: What the record of each row must hold, from the first row.
        quiet: Whether to leave warnings out.
    """
    count = 0
    remaining = iter(rows)
    for record in unfinished(path, depends_on, quiet):
        row = next(remaining, None)
        if row is None or any(record.get(key) != value for key, value in row.items()):
            _warn(f"line {count + 1} of {path}.part is not row {count + 1} of the source: starting anew", quiet)
            return 0
        count += 1
    return count


def move_unfinished(path: Path, place: Path) -> bool:
    """Moves what an interrupted writer left of a file, so that another place can be gone on with.

    Returns:
        False, and nothing is moved, if a process is still writing it.
    """
    part, note = _beside(path)
    with part.open("r+b") as file:
        if not _lock(file):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        for left, moved in zip((part, note), _beside(place), strict=True):
            os.replace(left, moved)
    return True


def _lock(file: IO[bytes]) -> bool:
    """Marks a file as being written until it is closed; False if another process has marked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _warn(text: str, quiet: bool) -> None:
    if not quiet:
        rank_zero_warn(text)


def _record(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
