"""The argument parser of all commands: its errors are one line."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
import sys
from contextvars import ContextVar
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from moslim.errors import UsageError
from moslim.failures import debugging, in_own_code
from moslim.option_errors import shortened
from moslim.training.lightning_compat import option_names

_FILE: ContextVar[str] = ContextVar("file", default="")
"""The config that is being read."""


def refuse_dangerous_names() -> None:
    """Refuses class paths such as ``os.system``, where jsonargparse keeps a list of them (4.53 and later)."""
    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        set_parsing_settings(import_path_denylist=["runpy"])  # any entry makes it refuse what it would warn of


class MoslimParser(LightningArgumentParser):
    """Says in one line which option is wrong, in which file, and why."""

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
        token = _FILE.set(str(path))
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: a config is a text in UTF-8, and this file is none ({error})") from error
        finally:
            _FILE.reset(token)

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
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        close = difflib.get_close_matches(unknown[1], option_names(parser), 1) if unknown else []
        meant = f"; did you mean {close[0]}?" if close else ""
        hint = f"{parser.prog.replace(' [options]', '')} --help lists the options"
        self.exit(2, f"error: {place}{shortened(message)}{meant}\n({hint})\n")


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
