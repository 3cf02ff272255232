"""Checks of configs, which name classes that are imported and called, and defaults for commands without a config."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moslim.reward.classifier_export import is_classifier, local_folder
from moslim.utils.errors import UsageError

_CONFIG = ("--config", "-c")
_SCORING = ("predict", "test", "export")
_LONGEST_CONFIG = 2**20
_MODULE = re.compile(r"(?:class_path: ?['\"]?|^|=)([A-Za-z_]\w*)(?:\.\w+)+")


def check_configs(arguments: Sequence[str]) -> None:
    """Refuses a config that lies in the folder of a model, which may be somebody else's.

    Raises:
        UsageError: One does.
    """
    for file in _configs(arguments):
        folder = _model_folder(file.resolve().parent)
        if folder is not None:
            raise UsageError(
                f"{file} lies in the folder of a model, {folder}: a config is code, since it names classes that are "
                "imported and called. A shared classifier needs none: predict --model.classifier FOLDER "
                "--data.source.predict ROWS. To run this one all the same, read it and copy it to a place of your own"
            )


def imports_from_here(arguments: Sequence[str]) -> bool:
    """Whether classes may be imported from the current folder.

    They may where the command line is all there is, names a module that lies there, or has a config from there; never
    where the current folder is that of a model.
    """
    here = Path.cwd()
    if _model_folder(here) is not None:
        return False
    files = _configs(arguments)
    own = any(file.resolve().is_relative_to(here) for file in files)
    named = {match[1] for argument in arguments for match in _MODULE.finditer(argument)}
    return not files or own or any((here / f"{name}.py").exists() or (here / name).is_dir() for name in named)


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """Completes a command on a saved classifier that comes without a config: what it needs is in the folder, as data.

    Args:
        arguments: Arguments of the command.

    Raises:
        MissingFileError: There is no such folder.
        UsageError: The folder is no saved classifier.
    """
    given = list(arguments)
    folder = _value(given, "--model.classifier")
    if not given or given[0] not in _SCORING or folder is None or _configs(given) or _value(given, "--model"):
        return given
    if not is_classifier(folder):
        raise UsageError(f"--model.classifier {folder}: it is no classifier saved by MOSLIM")
    config: dict[str, Any] = json.loads((local_folder(folder) / "config.json").read_text(encoding="utf-8"))
    dimensions = {str(name): [str(level) for level in levels] for name, levels in config["dimensions"]}
    defaults = {
        "--preferences.dimensions": json.dumps(dimensions),
        "--trainer.logger": "false",
        "--trainer.default_root_dir": f"outputs/{given[0]}",
        "--model": "moslim.RewardClassifier",
        "--data": "moslim.PreferenceDataModule",
        "--data.source": "moslim.data.Table",
    }
    added = [part for name, value in defaults.items() if _value(given, name) is None for part in (name, value)]
    return [given[0], *added, *given[1:]]


def _configs(arguments: Sequence[str]) -> list[Path]:
    """Files that are read as configs: those of ``--config``, and as values of other options what has their form."""
    files = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not equals and name.startswith("-"):
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if name.startswith("-") and value and (name in _CONFIG or _is_config(Path(value))):
            files.append(Path(value))
    return files


def _is_config(file: Path) -> bool:
    """Whether an option would read a file as the config of a part: it is YAML, or names a class."""
    if file.suffix in (".yaml", ".yml"):
        return True
    try:
        with file.open("rb") as opened:
            text = opened.read(_LONGEST_CONFIG)
        return b"class_path" in text and _names_class(yaml.safe_load(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # no file, no name of one, or something else
        return False


def _names_class(part: Any) -> bool:
    """Whether some entry of a config says which class to take."""
    if isinstance(part, dict):
        return "class_path" in part or any(map(_names_class, part.values()))
    return isinstance(part, list) and any(map(_names_class, part))


def _value(arguments: Sequence[str], option: str) -> str | None:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def _model_folder(folder: Path) -> Path | None:
    """The folder of a model that this one is, or lies in; below the current folder, or anywhere if it is not there."""
    here = Path.cwd()
    for place in (folder, *folder.parents):
        if _holds_model(place):
            return place
        if place == here:
            return None
    return None


def _holds_model(folder: Path) -> bool:
    if (folder / "adapter_config.json").exists():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config
