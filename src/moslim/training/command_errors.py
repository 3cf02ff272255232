"""Conversion of exceptions to one message and an exit status.

The status is 2 for a mistake that the user can correct, 1 for a failed run, 130 after Ctrl-C, 143 after SIGTERM.
Messages of jsonargparse about an option are shortened to key, value and reason. Folders of a run that did not start
are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moslim.callbacks.guards import GateError, GuardError
from moslim.generation.vllm_client import ServerError
from moslim.utils.errors import UsageError

_KEY = re.compile(r'^(?:Parser key|Configuration key) "([^"]+)":?\s*(.*)$', re.DOTALL)
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':$")
_TYPE = re.compile(r"<(?:class|enum) '([\w.]+)'>")
_EXPECTED = re.compile(r"^Expected an? (.+?)(?:\. Got value: (.*))?$", re.DOTALL)
_NO_PATH = re.compile(r"^(?:Expected a dot|Unexpected) import path (?:string|format): (.*)$", re.DOTALL)
_NO_MODULE = re.compile(r"^No module named '[^']+'$")
_NO_GROUP = re.compile(
    r"""^Parser key "([^"]+)":\n *Unable to load config '(.+)'\n *- Parser key "\1": Unable to load config "\2"$"""
)
_NO_CLASS = re.compile(r"^Expected a dot import path string: (.*)$", re.DOTALL)
_NUMBER = re.compile(r"^Expected an? <class '(?:int|float)'>")
_CALLABLE = re.compile(r"^Type .+? expects a function or a callable class: (.*)$", re.DOTALL)
_NO_PART = re.compile(r"^Not a valid subclass of (\w+)\. Got value: (.*)$", re.DOTALL)
_GOT = re.compile(r"\. Got value: .*$", re.DOTALL)
_OUTER_LINES = (
    "Does not validate against any of the Union subtypes",
    "Errors:",
    "Given value type:",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)
_LONGEST = 300


@dataclass
class _Line:
    """Line of a message with the lines that are indented below it."""

    text: str
    children: list[_Line] = field(default_factory=list)


@dataclass
class _Reason:
    """Reason of an error message, with its context."""

    keys: tuple[str, ...]
    """Option, from the outermost key to the innermost."""
    owner: str
    """Path of the class whose argument the option is; empty if unknown."""
    text: str
    types: str
    """Line of the message that lists the allowed types; empty if there is none."""
    value: str


def shortened(message: str, missing: Callable[[str], str] = "there is no file {}".format) -> str:
    """Returns the most specific reason of a message of jsonargparse, as ``key: reason``.

    If a value fits none of several types, jsonargparse lists an error per type, nested in the errors of the enclosing
    classes. The reason at the innermost key is the specific one.

    Args:
        message: The message; one of another form is returned unchanged.
        missing: Function that returns the message on a missing file.
    """
    if group := _NO_GROUP.match(message.strip()):
        return f"{group[1]}: {missing(group[2])}"
    reasons = list(_reasons(_tree(message), (), "", "", ""))
    if not any(reason.keys for reason in reasons) and not message.startswith(_OUTER_LINES):
        return message
    depth = max(len(reason.keys) for reason in reasons)
    innermost = [reason for reason in reasons if len(reason.keys) == depth]
    specific = [reason for reason in innermost if not _is_generic(reason.text)] or innermost
    first = specific[0]
    same_option = [reason for reason in specific if (reason.keys, reason.owner) == (first.keys, first.owner)]
    key = ".".join(first.keys)
    if file := next((name for reason in same_option for name in _option_files(reason)), None):
        return f"{key}: {missing(file)}"
    owner = f" (of {first.owner})" if first.owner else ""
    return f"{key}{owner}: {_joined(same_option)}" if key else _joined(same_option)


def _option_files(reason: _Reason) -> Iterator[str]:
    """Yields names of missing files that jsonargparse took for class paths."""
    names = [path[1]] if (path := _NO_PATH.match(reason.text)) else []
    names += [reason.owner, reason.value] if _NO_MODULE.match(reason.text) else []
    yield from (name for name in names if "/" in name or name.endswith((".yaml", ".yml", ".json")))


def _joined(reasons: list[_Reason]) -> str:
    """Joins the reasons of one option to one sentence."""
    value = _truncated(next((reason.value for reason in reasons if reason.value), ""))
    got = ", and none is given" if value == "None" else f", not {value}" if value else ""
    if any(_NUMBER.match(reason.text) for reason in reasons):  # lr: a float, or a tensor by its class path
        reasons = [reason for reason in reasons if not _NO_CLASS.match(reason.text)]
    unknown = next((match for reason in reasons if (match := _NO_CLASS.match(reason.text))), None)
    if unknown:
        types = [path for reason in reasons for path in _TYPE.findall(reason.types) if "." in path]
        names = sorted({name for path in types for name in _subclass_names(path)})
        known = f": known are {', '.join(names)}" if names else ""
        return (
            f"there is no class {_truncated(unknown[1])!r}{known}; a class of your own is named by its module and name"
        )
    expected = [match[1] for reason in reasons if (match := _EXPECTED.match(reason.text))]
    if len(expected) == len(reasons):
        types = list(dict.fromkeys(_plain_types(text) for text in expected))
        return f"expected {' or '.join(types)}{got}"
    others = [reason.text for reason in reasons if not _EXPECTED.match(reason.text)]
    return "; ".join(dict.fromkeys(_plain_types(text) for text in others))


def _tree(message: str) -> list[_Line]:
    """Nests the lines of a message by indentation; skips blank lines."""
    roots: list[_Line] = []
    open_lines: list[tuple[int, _Line]] = []
    for raw in message.splitlines():
        if not raw.strip():
            continue
        indent = len(raw) - len(raw.lstrip())
        line = _Line(raw.strip().removeprefix("- "))
        while open_lines and open_lines[-1][0] >= indent:
            open_lines.pop()
        (open_lines[-1][1].children if open_lines else roots).append(line)
        open_lines.append((indent, line))
    return roots


def _reasons(lines: list[_Line], keys: tuple[str, ...], owner: str, types: str, value: str) -> Iterator[_Reason]:
    """Yields the reasons in lines and their children, with the context of the lines (see :class:`_Reason`)."""
    for line in lines:
        if line.text.startswith("Subtypes: "):
            types = line.text
        elif line.text.startswith("Given value: ") and not line.text.startswith("Given value: NestedArg("):
            value = _GOT.sub("", line.text.removeprefix("Given value: "))
    for line in lines:
        if key := _KEY.match(line.text):
            rest = [_Line(key[2])] if key[2] else []
            yield from _reasons([*rest, *line.children], (*keys, key[1]), owner, "", "")
        elif class_path := _CLASS.match(line.text):
            yield from _reasons(line.children, keys, class_path[1], types, value)
        elif part := _NO_PART.match(line.text):
            got = value if "NestedArg(" in part[2] else part[2]
            yield _Reason(keys, owner, f"Expected a {part[1]}", types, got)
        elif called := _CALLABLE.match(line.text):
            inner = _Line(called[1] if _KEY.match(called[1]) else _GOT.sub("", called[1]), line.children)
            got = _GOT.search(called[1])
            yield from _reasons([inner], keys, owner, types, got[0].removeprefix(". Got value: ") if got else value)
        elif line.text.startswith(_OUTER_LINES):
            yield from _reasons(line.children if line.text == "Errors:" else [], keys, owner, types, value)
        elif not line.text.startswith(("Subtypes: ", "Given value: ")):
            text = " ".join([line.text, *_flat(line.children)])
            match = _EXPECTED.match(text)
            yield _Reason(keys, owner, text, types, match[2] if match and match[2] else value)


def _flat(lines: list[_Line]) -> Iterator[str]:
    for line in lines:
        yield line.text
        yield from _flat(line.children)


def _is_generic(text: str) -> bool:
    """Whether a reason says nothing specific: the value is not null, no truth value or no path of a file."""
    return text.startswith(("Expected a <class 'NoneType'>", "Expected a path but ", "Expected a <class 'bool'>"))


def _plain_types(text: str) -> str:
    """Formats types as in source code: ``int`` for ``<class 'int'>``."""
    text = _TYPE.sub(lambda match: match[1].removeprefix("collections.abc."), text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", text)
    return text.replace("NoneType", "null").replace("typing.", "")


def _truncated(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _subclass_names(path: str) -> Iterator[str]:
    """Yields the names of imported public subclasses of the class with the given path."""
    module, _, name = path.rpartition(".")
    base = getattr(sys.modules.get(module), name, None)
    if not isinstance(base, type):
        return
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        if not getattr(subclass, "__abstractmethods__", None) and not subclass.__name__.startswith("_"):
            yield subclass.__name__
        yield from _subclass_names(f"{subclass.__module__}.{subclass.__qualname__}")


_START_FILES = ("config.yaml", "hparams.yaml")


class NewFolders:
    """Folders of a run, and their parents, that do not exist before the run; removed if it does not start.

    Args:
        folders: Folders that the run writes to.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self._new = [Path(folder) for folder in folders if not Path(folder).exists()]
        parents = {parent for folder in self._new for parent in folder.parents if not parent.exists()}
        self._new_parents = sorted(parents, key=lambda parent: len(parent.parts), reverse=True)

    def remove(self) -> None:
        """Removes the folders that hold nothing but the config of the run, and then their empty parents."""
        for folder in self._new:
            content = list(folder.rglob("*"))
            if all(path.is_dir() or (path.parent == folder and path.name in _START_FILES) for path in content):
                for path in sorted(content, key=lambda path: len(path.parts), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                with contextlib.suppress(FileNotFoundError):
                    folder.rmdir()
        for folder in self._new_parents:
            with contextlib.suppress(OSError):  # missing, or not empty
                folder.rmdir()


USAGE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_FLAG = "--debug"
_VARIABLE = "MOSLIM_DEBUG"
_STOPPED = (GuardError, GateError, ServerError)
_DOTTED_ERROR = re.compile(r"^[ |+-]*([A-Za-z_][\w.]*(?:Error|Exception)): ?", re.MULTILINE)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PACKAGE = str(Path(__file__).parents[1])


@dataclass
class Failure:
    """Message and exit status of a failed command."""

    message: str
    status: int


def without_flag(arguments: list[str]) -> list[str]:
    """Removes ``--debug`` from the arguments and sets ``MOSLIM_DEBUG`` for this process and its children."""
    if _FLAG in arguments:
        os.environ[_VARIABLE] = "1"
    return [argument for argument in arguments if argument != _FLAG]


def debugging() -> bool:
    """Whether to show tracebacks and full messages of libraries (``--debug``)."""
    return os.environ.get(_VARIABLE, "").lower() not in ("", "0", "false", "no", "off")


@contextmanager
def reported() -> Iterator[None]:
    """Context that ends the process with one message after a known failure; other exceptions pass unchanged.

    Raises:
        SystemExit: A known failure, with its status.
    """
    try:
        yield
    except SIGTERMException as error:
        if not _rank():
            print("stopped by SIGTERM", file=sys.stderr)
        # Lightning kills the main process if a child process ends with a status other than 0.
        raise SystemExit(TERMINATED if not _rank() else 0) from error
    except SystemExit as error:
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's exit after Ctrl-C
            raise SystemExit(INTERRUPTED) from error
        raise
    except KeyboardInterrupt as error:
        raise SystemExit(INTERRUPTED) from error
    except Exception as error:
        known = failure(error)
        if known is None:
            raise
        if debugging():
            traceback.print_exception(error)
        process = f" (process {_rank()})" if _rank() else ""
        print(f"error{process}: {known.message}", file=sys.stderr)
        raise SystemExit(known.status) from None


def failure(error: BaseException) -> Failure | None:
    """Returns message and status of an exception; None for an unexpected one, which needs its traceback.

    Args:
        error: The exception. A :class:`UsageError` is also recognized if a library wrapped it or another process raised
            it.
    """
    for cause in _chain(error):
        if isinstance(cause, _STOPPED):
            return Failure(f"{_message(cause)}\n({_FLAG} shows the traceback)", FAILED)
        if isinstance(cause, UsageError | MisconfigurationException):
            return Failure(_message(cause), USAGE)
        if _is_out_of_memory(cause):
            first_line = str(cause).strip().splitlines()[0]
            return Failure(
                f"out of memory: {first_line}\nSmaller batches (data.batch_size, data.eval_batch_size), shorter texts "
                "(data.max_length), model.gradient_checkpointing or model.lora need less; docs/memory.md says more. "
                f"({_FLAG} shows the traceback)",
                FAILED,
            )
        remote = _remote_failure(cause)
        if remote is not None:
            return remote
    if isinstance(error, FileNotFoundError) and _raised_by_lightning(error):
        return Failure(str(error), USAGE)
    if isinstance(error, ValueError | RuntimeError | TypeError) and _raised_by_lightning(error):
        return Failure(f"{error}\n({_FLAG} shows the traceback)", FAILED)
    if isinstance(error, OSError) and error.errno is not None and not in_own_code(error):
        return Failure(
            f"{error.strerror}: {error.filename or 'no file is named'}\n({_FLAG} shows the traceback)", FAILED
        )
    return None


def in_own_code(error: BaseException) -> bool:
    """Whether the traceback contains code of the user, outside of this package and installed libraries."""
    return any(_is_user_file(file) for file in _files(error.__traceback__))


def _rank() -> int:
    return getattr(rank_zero_only, "rank", None) or 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the exception and its explicit causes (``raise ... from``)."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _message(error: BaseException) -> str:
    """Returns an exception's message, without the traceback that a DataLoader worker prepends."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _last_error(text)[1] if text.startswith("Caught ") else text


def _last_error(text: str) -> tuple[str, str]:
    """Returns class path and message of the exception at the end of a printed traceback."""
    matches = list(_DOTTED_ERROR.finditer(text))
    return (matches[-1][1], text[matches[-1].end() :].strip()) if matches else ("", text)


def _remote_failure(error: BaseException) -> Failure | None:
    """Returns a known failure of another process, whose traceback is the text of this exception."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return None
    class_path, message = _last_error(text)
    name = class_path.rsplit(".", 1)[-1]
    if name in {error_class.__name__ for base in _STOPPED for error_class in (base, *_subclasses(base))}:
        return Failure(f"{message}\n({_FLAG} shows the traceback)", FAILED)
    usage_errors = (UsageError, *_subclasses(UsageError), MisconfigurationException)
    if name in {error_class.__name__ for error_class in usage_errors}:
        return Failure(message, USAGE)
    return None


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _files(frame: TracebackType | None) -> Iterator[str]:
    """Yields the source file of each frame of a traceback, outermost first."""
    while frame is not None:
        yield frame.tb_frame.f_code.co_filename
        frame = frame.tb_next


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning's code raised the exception, and the traceback contains no code of the user."""
    files = list(_files(error.__traceback__))
    return bool(files) and f"{os.sep}lightning{os.sep}" in files[-1] and not in_own_code(error)


def _is_user_file(file: str) -> bool:
    # compiled libraries have relative names
    is_outside = os.path.isabs(file) and not file.startswith((_PACKAGE, *_LIBRARIES))
    return is_outside and Path(file).name not in ("main.py", "moslim")  # entry points of the command
