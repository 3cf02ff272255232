"""Entries of lists that one config names and a later one, or an option, silently takes away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def dropped(files: Sequence[str | Path], config: Mapping[str, Any]) -> list[str]:
    """Returns a message for each part that a list of a config names and the whole config lacks.

    A list replaces the one of an earlier config, where ``callbacks+`` adds to it.

    Args:
        files: The configs, from the first.
        config: What they and the command line give together, as plain data.
    """
    messages = []
    for file in files:
        for key, names in _lists(_read(file)):
            left = _names(_at(config, key))
            lost = [name for name in names if left is not None and name.rpartition(".")[2] not in left]
            if lost:
                option = ".".join(part for part in key if part != "init_args")
                messages.append(
                    f"{file}: {option} names {', '.join(lost)}, which a later config or option drops, as it gives the "
                    f"list anew; `{key[-1]}+` adds to the list"
                )
    return messages


def _read(file: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # a config in another form, which the parser knows
        return None


def _lists(config: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields the place of each list of parts, with their class paths."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _lists(value, (*key, str(name).removesuffix("+")))
    elif isinstance(config, list):
        paths = [part.get("class_path") for part in config if isinstance(part, dict)]
        names = [path for path in paths if isinstance(path, str)]
        if names:
            yield key, names


def _names(value: Any) -> set[str] | None:
    """Short names of the classes in a list, or of a single one; None of something that is no list of parts."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(part, Mapping) for part in parts):
        return None
    return {str(part.get("class_path", "")).rpartition(".")[2] for part in parts}


def _at(config: Any, key: tuple[str, ...]) -> Any:
    for name in key:
        if not isinstance(config, Mapping) or name not in config:
            return None
        config = config[name]
    return config
