"""The folder of a run that did not begin: what its start has written is taken away again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

_STARTED = ("config.yaml", "hparams.yaml")


class NewFolders:
    """Remembers which of a run's folders, and of those above them, are not there yet.

    Args:
        folders: Folders that the run will write to.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self._new = [Path(folder) for folder in folders if not Path(folder).exists()]
        above = {place for folder in self._new for place in folder.parents if not place.exists()}
        self._above = sorted(above, key=lambda place: len(place.parts), reverse=True)

    def remove(self) -> None:
        """Removes those that hold nothing but the config of the run, and then what is empty above them."""
        for folder in self._new:
            inside = list(folder.rglob("*"))
            if all(path.is_dir() or (path.parent == folder and path.name in _STARTED) for path in inside):
                for path in sorted(inside, key=lambda path: len(path.parts), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                with contextlib.suppress(FileNotFoundError):
                    folder.rmdir()
        for folder in self._above:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()
