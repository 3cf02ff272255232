"""Protection against configs of others, which can run code, and defaults for commands without a config."""

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
    """Refuses configs in the folder of a model, which someone else may have written.

    Args:
        arguments: Arguments of the command.

    Raises:
        UsageError: A config lies in the folder of a model.
    """
    for file in _configs(arguments):
        folder = _model_folder(file.resolve().parent)
        if folder is not None:
            raise UsageError(
                f"{file} lies in the folder of a model, {folder}: a config is code, since it names classes that are "
                "imported and called. A shared classifier needs none: predict --model.classifier FOLDER "
                "--data.source.predict ROWS. To use this config anyway, read it and copy it to a folder of your own"
            )


def imports_from_here(arguments: Sequence[str]) -> bool:
    """Whether classes may be imported from the current folder.

    They may if the command has no config, has one from the current folder, or names a module in it; never if the
    current folder is that of a model.

    Args:
        arguments: Arguments of the command.
    """
    current = Path.cwd()
    if _model_folder(current) is not None:
        return False
    configs = _configs(arguments)
    if not configs or any(config.resolve().is_relative_to(current) for config in configs):
        return True
    modules = {match[1] for argument in arguments for match in _MODULE.finditer(argument)}
    return any((current / f"{module}.py").exists() or (current / module).is_dir() for module in modules)


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """Adds default options to a command on a saved classifier that has no config; other commands are unchanged.

    The dimensions are read from the ``config.json`` of the classifier, which is data and runs no code.

    Args:
        arguments: Arguments of the command.

    Raises:
        MissingFileError: The folder of the classifier does not exist.
        UsageError: The folder holds no saved classifier.
    """
    given = list(arguments)
    folder = _value(given, "--model.classifier")
    if not given or given[0] not in _SCORING or folder is None or _configs(given) or _value(given, "--model"):
        return given
    if not is_classifier(folder):
        raise UsageError(
            f"--model.classifier {folder}: it is no classifier saved by MOSLIM; name the folder that `export` wrote"
        )
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
    added = [text for option, value in defaults.items() if _value(given, option) is None for text in (option, value)]
    return [given[0], *added, *given[1:]]


def _configs(arguments: Sequence[str]) -> list[Path]:
    """Returns the files that the command reads as configs, with ``--config`` or as the value of another option."""
    files = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not equals and option.startswith("-"):
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if option.startswith("-") and value and (option in _CONFIG or _is_config(Path(value))):
            files.append(Path(value))
    return files


def _is_config(file: Path) -> bool:
    """Whether an option would read its value as a config: a YAML file, or another file that names a class."""
    if file.suffix in (".yaml", ".yml"):
        return True
    try:
        with file.open("rb") as stream:
            text = stream.read(_LONGEST_CONFIG)
        return b"class_path" in text and _names_class(yaml.safe_load(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # no file, no valid file name, or no YAML
        return False


def _names_class(config: Any) -> bool:
    """Whether an entry of a config has the key ``class_path``."""
    if isinstance(config, dict):
        return "class_path" in config or any(map(_names_class, config.values()))
    return isinstance(config, list) and any(map(_names_class, config))


def _value(arguments: Sequence[str], option: str) -> str | None:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def _model_folder(folder: Path) -> Path | None:
    """Returns the folder of a model that is or contains ``folder``; None if there is none.

    The search ends at the current folder, or at the root if ``folder`` is outside of it.
    """
    current = Path.cwd()
    for candidate in (folder, *folder.parents):
        if _holds_model(candidate):
            return candidate
        if candidate == current:
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
