"""The argument parser of all commands: its errors are one line."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from moslim.errors import UsageError
from moslim.failures import debugging, in_own_code
from moslim.layers import forget, forget_option, missing
from moslim.option_errors import shortened
from moslim.training.lightning_compat import before_options, option_names

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
        """Adds an argument; a config is a layer over those before it, see :func:`~moslim.layers.forget`."""
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
