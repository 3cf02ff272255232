"""The argument parser of all commands: layered configs, shipped configs, YAML texts, and errors of one line."""

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
    """Returns the namespace that holds an argument of a part, which may be named without ``init_args``."""
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


TEXTS = ("columns", "comparison_dimensions", "constants", "counts", "dimensions", "keep", "missing", "where")
"""Options that hold texts: every scalar in a list or mapping below one is the text that is written."""
_STR, _INT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "null", "merge"))
_PLAIN_INTEGER = re.compile("-?(0|[1-9][0-9]*)")


def install() -> None:
    """Lets configs and options be read so, with the paths of the shipped configs that they name."""
    plain = get_loader("yaml")
    if getattr(plain, "quotes_texts", False):
        return

    def load(stream: str, **kwargs: Any) -> Any:
        return located(plain(quote_texts(stream), **kwargs))

    load.quotes_texts = True  # type: ignore[attr-defined]
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def quote_texts(stream: str) -> str:
    """Puts quotes around scalars that YAML would read as numbers or truth values where a text is wanted.

    These are the keys of all mappings, ``{1: 0, no: 1}``; what stands in lists and mappings below an option of
    :data:`TEXTS`, ``where: {lang: [no]}``; and whole numbers that are not written plainly, such as ``010``, which an
    option of a number reads all the same. A ``null`` in a list that is an option's whole value is a text, too: the
    parser would make the text ``None`` of it. All else stays as it is.

    Args:
        stream: A YAML document, or the value of an option.

    Raises:
        yaml.YAMLError: A mapping has a key twice.
    """
    if not any(mark in stream for mark in ":{["):
        return stream
    try:
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # the loader says what is wrong
        return stream
    if root is None:
        return stream
    listed = isinstance(root, yaml.SequenceNode)
    places = {
        (node.start_mark.index, node.end_mark.index): node.value
        for node, wanted in _scalars(root, wanted=False, seen=set())
        if node.value and node.style is None and _is_lost(node, wanted, listed)
    }
    for (start, end), text in sorted(places.items(), reverse=True):
        if stream[start:end] == text:  # and no anchor or tag before it
            stream = f"{stream[:start]}{json.dumps(text, ensure_ascii=False)}{stream[end:]}"
    return stream


def _is_lost(node: yaml.ScalarNode, wanted: bool, listed: bool) -> bool:
    """Whether YAML would make something else of a text."""
    if node.tag in (_STR, _MERGE):
        return False
    odd = node.tag == _INT and not _PLAIN_INTEGER.fullmatch(node.value)
    return wanted or odd or (listed and node.tag == _NULL)


def _scalars(node: yaml.Node, wanted: bool, seen: set[int]) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """All scalars, and whether a text is wanted there."""
    if isinstance(node, yaml.ScalarNode):
        yield node, wanted
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _scalars(entry, wanted, seen)
        return
    keys: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys and key.tag != _MERGE:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice in one mapping", problem_mark=key.start_mark
                )
            keys.add(key.value)
            yield key, True
        inside = isinstance(key, yaml.ScalarNode) and key.value in TEXTS and not isinstance(value, yaml.ScalarNode)
        yield from _scalars(value, wanted or inside, seen)


_FILE: ContextVar[str] = ContextVar("file", default="")
"""The config that is being read, as it is named."""
_FOLDER: ContextVar[Path] = ContextVar("folder")
"""The folder from which it is named."""


def refuse_dangerous_names() -> None:
    """Refuses class paths such as ``os.system``, where jsonargparse keeps a list of them (4.53 and later)."""
    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        set_parsing_settings(import_path_denylist=["runpy"])  # any entry makes it refuse what it would warn of


def layered() -> None:
    """Lets options of the command line start from a class's defaults where they name one, as configs do."""

    def before(parser: Any, config: Namespace, value: Any, option: str) -> None:
        if isinstance(parser, MoslimParser):
            forget_option(config, option, value)

    before_options(before)


class _ConfigLayer(ActionConfigFile):
    """Reads a config over earlier ones, without what it gives anew."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        file = Path(values)
        try:
            text, folder = (file.read_text(encoding="utf-8"), file.parent)
        except OSError:  # not a file, but the text of a config
            text, folder = values, Path()
        except UnicodeDecodeError:  # the parser says so
            text, folder = "", Path()
        try:
            layer = yaml.safe_load(text)
        except yaml.YAMLError:  # likewise
            layer = None
        if isinstance(layer, Mapping):
            forget(cfg, layer, folder.absolute())
        super().__call__(parser, cfg, values, option_string)


class MoslimParser(LightningArgumentParser):
    """Says in one line which option is wrong, in which file, and why."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Adds an argument; a config is a layer over those before it, see :func:`forget`."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _ConfigLayer
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Reads arguments, among them those that jsonargparse makes of an option of a nested class.

        It formats their values as Python does, so that a ``null`` would come as the text ``None``.
        """
        given = sys.argv[1:] if args is None else args
        return super().parse_args([_with_null(arg) for arg in given], *rest, **options)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Notes the config for messages.

        Raises:
            UsageError: It is not a text in UTF-8.
        """
        token, here = _FILE.set(str(path)), _FOLDER.set(Path.cwd())
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: a config is a text in UTF-8, and this file is none ({error})") from error
        finally:
            _FILE.reset(token)
            _FOLDER.reset(here)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the command with status 2, or raises what code of the user raised when it was imported.

        Args:
            message: The whole message.
            ex: The exception behind it.
        """
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if in_own_code(cause):
                raise cause
            cause = cause.__cause__ or cause.__context__
        parser = getattr(ex, "subcommand_parser", None) or self
        place = f"{_FILE.get()}: " if _FILE.get() else ""
        config = _FOLDER.get() / _FILE.get() if _FILE.get() else None
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        close = difflib.get_close_matches(unknown[1], option_names(parser), 1) if unknown else []
        meant = f"; did you mean {close[0]}?" if close else ""
        hint = f"{parser.prog.replace(' [options]', '')} --help lists the options"
        self.exit(2, f"error: {place}{shortened(message, lambda file: missing(file, config))}{meant}\n({hint})\n")


def _with_null(argument: str) -> str:
    """Writes ``null`` for Python's None in ``--key=value``, alone or inside a list or mapping."""
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
