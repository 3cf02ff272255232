"""Layers of configs: files shipped with the package, parts that a later layer gives anew, entries that it drops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

SHIPPED = Path(__file__).parent / "configs"
"""Folder of the shipped configs: in a checkout a link to ``configs``, in a wheel a copy of it."""
PREFIX = "configs:"
_SHIPPED_NAME = re.compile(rf"{PREFIX}([\w.-]+/)*[\w.-]+\.ya?ml")
_PART = ("class_path", "init_args", "dict_kwargs")


# --- shipped configs


def located(value: Any) -> Any:
    """Returns a value with the path of each shipped config in place of its name, ``configs:quickstart/policy.yaml``.

    Args:
        value: A text, or lists and mappings of texts. A name of no shipped config stays as it is.
    """
    if isinstance(value, dict):
        return {key: located(part) for key, part in value.items()}
    if isinstance(value, list):
        return [located(part) for part in value]
    if isinstance(value, str) and is_shipped(value):
        file = SHIPPED / value.removeprefix(PREFIX)
        return str(file) if file.is_file() else value
    return value


def is_shipped(name: str) -> bool:
    """Whether a text is the name of a shipped config, be there one or not."""
    return _SHIPPED_NAME.fullmatch(name) is not None


def missing(file: str, config: str | Path | None) -> str:
    """Returns a message on a file that is named and not there: where it was looked for, and what to do.

    Args:
        file: The file as it is named.
        config: The config that was read, or one that it names; None for an option of the command line.
    """
    names = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
    if file.startswith(PREFIX):
        folder = file.removeprefix(PREFIX).rpartition("/")[0]
        near = [name for name in names if name.rpartition("/")[0] == folder] or names
        return f"there is no shipped config {file}; there are {', '.join(PREFIX + name for name in near)}"
    by = _naming(file, Path(config)) if config is not None else None
    place = f"{by.parent}, the folder of {by.name}, which names it" if by else f"{Path.cwd()}, the current folder"
    alike = next((name for name in names if Path(name).parts == Path(file).parts[-2:]), None)
    remedy = f"; the shipped one is {PREFIX}{alike}" if alike else "; name it from there, or by its full path"
    return f"there is no file {file} in {place}{remedy}"


def _naming(file: str, config: Path) -> Path | None:
    """The config that names a file: the given one, or one that it names."""
    texts = set(_texts(_read(config)))
    if file in texts:
        return config
    below = (config.parent / located(text) for text in texts if text.endswith((".yaml", ".yml")))
    return next((by for part in below if part.is_file() and (by := _naming(file, part))), None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


# --- what a layer gives anew


def forget(config: Namespace, layer: Mapping[str, Any], folder: Path) -> None:
    """Takes out of a config what must not go on into a later layer.

    A layer that names the class of a part starts from the defaults of that class; a layer that only gives arguments of
    it goes on with what is there. A list, or an option whose names are free, is replaced as a whole.

    Args:
        config: What earlier layers gave; changed in place.
        layer: The later one, as it is written.
        folder: Where the files that it names are looked for.
    """
    for name, value in layer.items():
        if name in config:
            _forget_part(config, name, value, folder)


def forget_option(config: Namespace, option: str, value: Any) -> None:
    """Does the same for an option of the command line.

    ``--model.class_path X`` changes the class alone and keeps the arguments; ``+`` adds to a list.

    Args:
        config: What came before; changed in place.
        option: The option as it is written, ``--model.mapping``.
        value: Its value as it is written.
    """
    *parts, name = option.lstrip("-").split(".")
    if name == "class_path" or name.endswith("+"):
        return
    place: Any = config
    for part in parts:
        inner = _arguments(place, part)
        place = inner.get(part) if isinstance(inner, Namespace) else None
    place = _arguments(place, name)
    if isinstance(place, Namespace):
        forget(place, {name: _as_yaml(value)}, Path.cwd())


def _forget_part(config: Namespace, name: str, value: Any, folder: Path) -> None:
    earlier = config[name]
    if isinstance(earlier, list | dict) and name != "dict_kwargs":
        config.pop(name)
    elif isinstance(earlier, Namespace):
        if isinstance(value, str) and (content := _read(folder / located(value))) is not None:
            value, folder = content, (folder / located(value)).parent
        if "class_path" in earlier and not (isinstance(value, Mapping) and "class_path" not in value):
            for key in ("init_args", "dict_kwargs", "__path__"):
                earlier.pop(key, None)
        elif isinstance(value, Mapping):
            bare = "class_path" in earlier and not any(key in value for key in _PART)
            inner = earlier.get("init_args") if bare else earlier
            if isinstance(inner, Namespace):
                forget(inner, value, folder)


def _arguments(place: Any, name: str) -> Any:
    """What holds an argument of a part, which may be named without ``init_args``."""
    if isinstance(place, Namespace) and "class_path" in place and name not in _PART:
        return place.get("init_args")
    return place


def _as_yaml(value: Any) -> Any:
    """An option's value as a mapping or list where it is one."""
    try:
        content = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
    return content if isinstance(content, dict | list) else value


# --- what a layer drops


def dropped(files: Sequence[str | Path], config: Mapping[str, Any]) -> list[str]:
    """Returns a message for each part that a list of a config names and the whole config lacks.

    A list replaces the one of an earlier config, where ``callbacks+`` adds to it. It is also gone where the class that
    takes it is named anew.

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
                    f"list, or the class that takes it, anew; `{key[-1]}+` adds to the list"
                )
    return messages


def _read(file: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no file, or a config in another form, which the parser knows
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
