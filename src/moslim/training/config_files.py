"""Argument parser of all commands: layered configs, shipped configs, YAML texts, and errors of one line."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from moslim.training.command_errors import debugging, in_own_code, shortened
from moslim.training.lightning_compat import before_options, option_names
from moslim.utils.errors import UsageError

SHIPPED = Path(__file__).parents[1] / "configs"
"""Folder of the shipped configs: in a checkout a link to ``configs``, in a wheel a copy of it."""
PREFIX = "configs:"
"""Prefix of the name of a shipped config."""
_SHIPPED_NAME = re.compile(rf"{PREFIX}([\w.-]+/)*[\w.-]+\.ya?ml")
_PART = ("class_path", "init_args", "dict_kwargs")


# --- shipped configs


def located(value: Any) -> Any:
    """Replaces names of shipped configs, such as ``configs:quickstart/policy.yaml``, by their paths.

    Args:
        value: A text, or nested lists and mappings. Names of configs that do not exist are kept.
    """
    if isinstance(value, dict):
        return {key: located(item) for key, item in value.items()}
    if isinstance(value, list):
        return [located(item) for item in value]
    if isinstance(value, str) and is_shipped(value):
        file = SHIPPED / value.removeprefix(PREFIX)
        return str(file) if file.is_file() else value
    return value


def is_shipped(name: str) -> bool:
    """Whether a text has the form of the name of a shipped config, which need not exist."""
    return _SHIPPED_NAME.fullmatch(name) is not None


def missing(file: str, config: str | Path | None) -> str:
    """Returns an error message on a missing file, with the folder that was searched and a remedy.

    Args:
        file: Name of the file as in the config or option.
        config: Config that names the file, directly or through other configs; None for an option of the command line.
    """
    names = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
    if file.startswith(PREFIX):
        folder = file.removeprefix(PREFIX).rpartition("/")[0]
        same_folder = [name for name in names if name.rpartition("/")[0] == folder] or names
        return f"there is no shipped config {file}; there are {', '.join(PREFIX + name for name in same_folder)}"
    source = _naming_config(file, Path(config)) if config is not None else None
    searched = (
        f"{source.parent}, the folder of {source.name}, which names it"
        if source
        else f"{Path.cwd()}, the current folder"
    )
    shipped = next((name for name in names if Path(name).parts == Path(file).parts[-2:]), None)
    remedy = f"; the shipped one is {PREFIX}{shipped}" if shipped else "; name it from there, or by its full path"
    return f"there is no file {file} in {searched}{remedy}"


def _naming_config(file: str, config: Path) -> Path | None:
    """Returns the config that names a file: the given one, or one that it names; None if there is none."""
    texts = set(_texts(_read(config)))
    if file in texts:
        return config
    named_configs = (config.parent / located(text) for text in texts if text.endswith((".yaml", ".yml")))
    sources = (_naming_config(file, path) for path in named_configs if path.is_file())
    return next(filter(None, sources), None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


# --- values that a layer replaces


def forget(config: Namespace, layer: Mapping[str, Any], folder: Path) -> None:
    """Removes from a config the values that a later layer replaces, before the two are merged.

    A layer that names the class of a part starts from the defaults of that class; a layer that only gives its arguments
    keeps the others. A list, or a mapping with free keys, is replaced as a whole.

    Args:
        config: Values of the earlier layers; changed in place.
        layer: The later layer as written.
        folder: Folder of the relative paths in the layer.
    """
    for name, value in layer.items():
        if name in config:
            _forget_part(config, name, value, folder)


def forget_option(config: Namespace, option: str, value: Any) -> None:
    """Removes the values that an option of the command line replaces, see :func:`forget`.

    ``--model.class_path X`` changes the class alone and keeps the arguments; ``+`` adds to a list.

    Args:
        config: Values of the configs and earlier options; changed in place.
        option: The option as written, such as ``--model.mapping``.
        value: Its value as written.
    """
    *parts, name = option.lstrip("-").split(".")
    if name == "class_path" or name.endswith("+"):
        return
    namespace: Any = config
    for part in parts:
        arguments = _arguments(namespace, part)
        namespace = arguments.get(part) if isinstance(arguments, Namespace) else None
    namespace = _arguments(namespace, name)
    if isinstance(namespace, Namespace):
        forget(namespace, {name: _as_yaml(value)}, Path.cwd())


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
            gives_arguments = "class_path" in earlier and not any(key in value for key in _PART)
            namespace = earlier.get("init_args") if gives_arguments else earlier
            if isinstance(namespace, Namespace):
                forget(namespace, value, folder)


def _arguments(namespace: Any, name: str) -> Any:
    """Returns the namespace that holds an argument of a part; ``init_args`` may be left out of its name."""
    if isinstance(namespace, Namespace) and "class_path" in namespace and name not in _PART:
        return namespace.get("init_args")
    return namespace


def _as_yaml(value: Any) -> Any:
    """Parses the value of an option if it is a YAML mapping or list; returns other values unchanged."""
    try:
        content = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
    return content if isinstance(content, dict | list) else value


# --- parts that a later layer drops


def dropped(files: Sequence[str | Path], config: Mapping[str, Any]) -> list[str]:
    """Returns a message for each list in a config of which the merged config lacks parts.

    A list replaces that of an earlier config, unless ``callbacks+`` adds to it. It is also lost if a later layer names
    the class that has it.

    Args:
        files: The configs in order.
        config: Merged values of the configs and the command line, as plain data.
    """
    messages = []
    for file in files:
        for key, class_paths in _lists(_read(file)):
            kept = _class_names(_get(config, key))
            dropped_paths = [path for path in class_paths if kept is not None and path.rpartition(".")[2] not in kept]
            if dropped_paths:
                option = ".".join(part for part in key if part != "init_args")
                messages.append(
                    f"{file}: {option} names {', '.join(dropped_paths)}, which a later config or option drops, as it "
                    f"sets the list, or the class that has it, again; `{key[-1]}+` adds to the list"
                )
    return messages


def _read(file: str | Path) -> Any:
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no file, or no YAML: the parser reports it
        return None


def _lists(config: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields key and class paths of each list of parts."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _lists(value, (*key, str(name).removesuffix("+")))
    elif isinstance(config, list):
        values = [part.get("class_path") for part in config if isinstance(part, dict)]
        class_paths = [value for value in values if isinstance(value, str)]
        if class_paths:
            yield key, class_paths


def _class_names(value: Any) -> set[str] | None:
    """Returns the class names of a part or list of parts, without modules; None for another value."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(part, Mapping) for part in parts):
        return None
    return {str(part.get("class_path", "")).rpartition(".")[2] for part in parts}


def _get(config: Any, key: tuple[str, ...]) -> Any:
    for name in key:
        if not isinstance(config, Mapping) or name not in config:
            return None
        config = config[name]
    return config


TEXTS = ("columns", "comparison_dimensions", "constants", "counts", "dimensions", "keep", "missing", "where")
"""Options whose values are texts: every scalar in a list or mapping below one is read as written."""
_STR, _INT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "null", "merge"))
_PLAIN_INTEGER = re.compile("-?(0|[1-9][0-9]*)")


def install() -> None:
    """Makes jsonargparse read YAML with :func:`quote_texts` and :func:`located`."""
    yaml_loader = get_loader("yaml")
    if getattr(yaml_loader, "quotes_texts", False):
        return

    def load(stream: str, **kwargs: Any) -> Any:
        return located(yaml_loader(quote_texts(stream), **kwargs))

    load.quotes_texts = True  # type: ignore[attr-defined]
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def quote_texts(stream: str) -> str:
    """Quotes scalars that are texts but that YAML would read as numbers or truth values.

    These are the keys of all mappings, ``{1: 0, no: 1}``; scalars in lists and mappings below an option of
    :data:`TEXTS`, ``where: {lang: [no]}``; and integers in another form than plain decimal, such as ``010``, which
    numeric options still accept. A ``null`` in a list that is the whole value of an option is quoted, too, since the
    parser would convert it to the text ``None``.

    Args:
        stream: A YAML document, or the value of an option.

    Raises:
        yaml.YAMLError: A mapping has a key twice.
    """
    if not any(mark in stream for mark in ":{["):
        return stream
    try:
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # reported by the loader
        return stream
    if root is None:
        return stream
    in_list = isinstance(root, yaml.SequenceNode)
    unquoted = {
        (node.start_mark.index, node.end_mark.index): node.value
        for node, is_text in _scalars(root, is_text=False, seen=set())
        if node.value and node.style is None and _is_converted(node, is_text, in_list)
    }
    for (start, end), text in sorted(unquoted.items(), reverse=True):
        if stream[start:end] == text:  # no anchor or tag before it
            stream = f"{stream[:start]}{json.dumps(text, ensure_ascii=False)}{stream[end:]}"
    return stream


def _is_converted(node: yaml.ScalarNode, is_text: bool, in_list: bool) -> bool:
    """Whether YAML would convert a text to another value."""
    if node.tag in (_STR, _MERGE):
        return False
    is_unusual_integer = node.tag == _INT and not _PLAIN_INTEGER.fullmatch(node.value)
    return is_text or is_unusual_integer or (in_list and node.tag == _NULL)


def _scalars(node: yaml.Node, is_text: bool, seen: set[int]) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """Yields all scalars, and whether each is a text."""
    if isinstance(node, yaml.ScalarNode):
        yield node, is_text
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _scalars(entry, is_text, seen)
        return
    keys: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys and key.tag != _MERGE:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice in one mapping; remove one", problem_mark=key.start_mark
                )
            keys.add(key.value)
            yield key, True
        holds_texts = isinstance(key, yaml.ScalarNode) and key.value in TEXTS and not isinstance(value, yaml.ScalarNode)
        yield from _scalars(value, is_text or holds_texts, seen)


_FILE: ContextVar[str] = ContextVar("file", default="")
"""Config that is being read, as named by the user."""
_FOLDER: ContextVar[Path] = ContextVar("folder")
"""Folder to which that name is relative."""


def refuse_dangerous_names() -> None:
    """Refuses class paths such as ``os.system``, if jsonargparse has a list of them (4.53 and later)."""
    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        set_parsing_settings(import_path_denylist=["runpy"])  # with any entry, it refuses rather than warns


def layered() -> None:
    """Applies :func:`forget_option` to options of the command line, which then layer as configs do."""

    def before(parser: Any, config: Namespace, value: Any, option: str) -> None:
        if isinstance(parser, MoslimParser):
            forget_option(config, option, value)

    before_options(before)


class _ConfigLayer(ActionConfigFile):
    """Action that merges a config over earlier ones after :func:`forget`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        file = Path(values)
        try:
            text, folder = (file.read_text(encoding="utf-8"), file.parent)
        except OSError:  # the text of a config instead of a file
            text, folder = values, Path()
        except UnicodeDecodeError:  # reported by the parser
            text, folder = "", Path()
        try:
            layer = yaml.safe_load(text)
        except yaml.YAMLError:  # reported by the parser
            layer = None
        if isinstance(layer, Mapping):
            forget(cfg, layer, folder.absolute())
        super().__call__(parser, cfg, values, option_string)


class MoslimParser(LightningArgumentParser):
    """Argument parser with layered configs and error messages of one line."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Adds an argument; configs are layered, see :func:`forget`."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _ConfigLayer
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parses arguments, also those that jsonargparse creates for the options of a nested class.

        It formats their values as Python source, so that ``null`` would be parsed as the text ``None``.
        """
        arguments = sys.argv[1:] if args is None else args
        return super().parse_args([_with_null(argument) for argument in arguments], *rest, **options)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Parses a config and names it in error messages.

        Raises:
            UsageError: The file is not UTF-8 text.
        """
        file_token, folder_token = _FILE.set(str(path)), _FOLDER.set(Path.cwd())
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: a config must be UTF-8 text ({error}); save it in this encoding") from error
        finally:
            _FILE.reset(file_token)
            _FOLDER.reset(folder_token)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with status 2, or raises the exception of user code that failed on import.

        Args:
            message: The whole message.
            ex: Cause of the error.
        """
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if in_own_code(cause):
                raise cause
            cause = cause.__cause__ or cause.__context__
        parser = getattr(ex, "subcommand_parser", None) or self
        prefix = f"{_FILE.get()}: " if _FILE.get() else ""
        config = _FOLDER.get() / _FILE.get() if _FILE.get() else None
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        similar = difflib.get_close_matches(unknown[1], option_names(parser), 1) if unknown else []
        suggestion = f"; did you mean {similar[0]}?" if similar else ""
        hint = f"{parser.prog.replace(' [options]', '')} --help lists the options"
        reason = shortened(message, lambda file: missing(file, config))
        self.exit(2, f"error: {prefix}{reason}{suggestion}\n({hint})\n")


def _with_null(argument: str) -> str:
    """Replaces Python's None in ``--key=value`` by ``null``, alone or inside a list or mapping."""
    option, equals, value = argument.partition("=")
    if not equals or not option.startswith("--") or "None" not in value:
        return argument
    if value == "None":
        return f"{option}=null"
    try:
        content = ast.literal_eval(value) if value.startswith(("[", "{")) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return argument
    return argument if content is None else f"{option}={json.dumps(content, ensure_ascii=False)}"
