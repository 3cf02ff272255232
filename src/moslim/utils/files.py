"""Files that appear whole: they are written beside their place and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a place beside ``path`` to write to; the file is renamed to ``path`` at the end.

    A reader or a crash never meets half a file. The place is the process's own, and is empty again after an error. The
    bytes are left to the operating system: after a power failure the file may be missing.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a file in UTF-8, see :func:`whole_file`."""
    write_bytes(path, content.encode())
