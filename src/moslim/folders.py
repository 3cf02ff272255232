"""Folders of models: each appears whole, and none takes the place of a model that the run reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moslim.errors import UsageError

_PART = ".part-"
_EARLIER = (
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "backbone/",
    "adapter/",
)


@contextmanager
def whole_folder(folder: Path, is_alike: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a folder to write a model to, whose content is moved to its place in the end, or is lost on an error.

    Weights and tokenizer of an earlier export go: they would be loaded with the new ones, or instead of them.

    Args:
        folder: Where the model is to be.
        is_alike: Whether a model that is there already is of the same kind.

    Raises:
        UsageError: It is not.
    """
    if (folder / "config.json").exists() and not is_alike(folder):
        raise UsageError(f"'{folder}' holds another model, which would be lost: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PART}*"):  # by a process that was killed
        shutil.rmtree(left)
    with TemporaryDirectory(prefix=_PART, dir=folder) as part:
        yield Path(part)
        for place in (place for pattern in _EARLIER for place in folder.glob(pattern)):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        for file in Path(part).iterdir():
            os.replace(file, folder / file.name)


def refuse_sources(folder: str | Path, sources: Mapping[str, str | None]) -> None:
    """Raises a ValueError where an export would take the place of what the run is built on.

    Args:
        folder: Where the export would go.
        sources: Folders and Hub names that the run reads, by option.
    """
    for option, source in sources.items():
        if source is not None and Path(source).resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"'{folder}' holds {option} = '{source}', which this run needs: name another folder")
