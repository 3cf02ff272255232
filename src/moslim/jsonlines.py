"""A file of records that is either whole or not there, and can be gone on with where its writer was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


class JsonLines:
    """Writes records to ``<name>.part``, batch by batch; :meth:`close` gives the file its name.

    Beside it lies ``<name>.part.json``, which says what the records depend on.

    Args:
        path: Where the file shall be.
        depends_on: What the records depend on, as plain data; see :func:`unfinished`.
        keep: Records of an interrupted writer to go on after; what it wrote behind them is lost.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any] | None = None, keep: int = 0) -> None:
        self.path = path
        self._part, self._note = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep:
            self._part.unlink(missing_ok=True)  # never old records beside a new note
            self._note.write_text(json.dumps(depends_on or {}, indent=1), encoding="utf-8")
        self._file = self._part.open("r+b" if keep else "wb")
        for _ in range(keep):
            self._file.readline()
        self._file.truncate()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records, and leaves none of them in memory."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()

    def close(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        os.replace(self._part, self.path)
        self._note.unlink()


def unfinished(path: Path, depends_on: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the whole records that an interrupted writer left of a file.

    None, with a warning, if they depend on anything else, or the note of what they depend on is damaged.

    Args:
        path: The file's place when it is complete.
        depends_on: What its records depend on now, as given to :class:`JsonLines`.
    """
    part, note = _beside(path)
    if not part.exists():
        return
    now = json.loads(json.dumps(depends_on))
    try:
        before = _record(note.read_bytes()) if note.exists() else {}
    except ValueError:
        rank_zero_warn(f"{note}, which says what {part} depends on, is damaged: starting anew")
        return
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        rank_zero_warn(f"{part} was written with another {' and '.join(changed)}: starting anew")
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
