"""Errors of a command as one message and an exit status.

The statuses are 2 for a mistake that the user can correct, 1 for a failed run, 130 after Ctrl-C, 143 after SIGTERM.
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
_WALL = (
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
    """A line of a message with the lines that are indented below it."""

    text: str
    below: list[_Line] = field(default_factory=list)


@dataclass
class _Reason:
    """One of the reasons that a message gives, and where it stands."""

    keys: tuple[str, ...]
    owner: str
    text: str
    kinds: str
    value: str


def shortened(message: str, missing: Callable[[str], str] = "there is no file {}".format) -> str:
    """Returns the most telling of the reasons that a message of jsonargparse lists, as ``key: reason``.

    A value that fits none of several types gets a wall of one error for each, nested in those of the classes around
    it. The reason at the innermost key is the one that says what is wrong.

    Args:
        message: The message; one of another form comes back as it is.
        missing: Says that a file does not exist.
    """
    if group := _NO_GROUP.match(message.strip()):
        return f"{group[1]}: {missing(group[2])}"
    reasons = list(_reasons(_tree(message), (), "", "", ""))
    if not any(reason.keys for reason in reasons) and not message.startswith(_WALL):
        return message
    depth = max(len(reason.keys) for reason in reasons)
    deepest = [reason for reason in reasons if len(reason.keys) == depth]
    telling = [reason for reason in deepest if not _is_filler(reason.text)] or deepest
    first = telling[0]
    together = [reason for reason in telling if (reason.keys, reason.owner) == (first.keys, first.owner)]
    key = ".".join(first.keys)
    if file := next((name for reason in together for name in _option_files(reason)), None):
        return f"{key}: {missing(file)}"
    of = f" (of {first.owner})" if first.owner else ""
    return f"{key}{of}: {_said(together)}" if key else _said(together)


def _option_files(reason: _Reason) -> Iterator[str]:
    """The file that was taken for a class, as it could not be read."""
    names = [path[1]] if (path := _NO_PATH.match(reason.text)) else []
    names += [reason.owner, reason.value] if _NO_MODULE.match(reason.text) else []
    yield from (name for name in names if "/" in name or name.endswith((".yaml", ".yml", ".json")))


def _said(reasons: list[_Reason]) -> str:
    """The reasons for one key as one sentence."""
    value = _cut(next((reason.value for reason in reasons if reason.value), ""))
    got = ", and none is given" if value == "None" else f", not {value}" if value else ""
    if any(_NUMBER.match(reason.text) for reason in reasons):  # lr: a float, or a tensor by its class path
        reasons = [reason for reason in reasons if not _NO_CLASS.match(reason.text)]
    unknown = next((match for reason in reasons if (match := _NO_CLASS.match(reason.text))), None)
    if unknown:
        kinds = [kind for reason in reasons for kind in _TYPE.findall(reason.kinds) if "." in kind]
        names = sorted({name for kind in kinds for name in _names(kind)})
        known = f": known are {', '.join(names)}" if names else ""
        return f"there is no class {_cut(unknown[1])!r}{known}; a class of your own is named by its module and name"
    expected = [match[1] for reason in reasons if (match := _EXPECTED.match(reason.text))]
    if len(expected) == len(reasons):
        kinds = list(dict.fromkeys(_plain(kind) for kind in expected))
        return f"expected {' or '.join(kinds)}{got}"
    others = [reason.text for reason in reasons if not _EXPECTED.match(reason.text)]
    return "; ".join(dict.fromkeys(_plain(text) for text in others))


def _tree(message: str) -> list[_Line]:
    """Lines by their indentation; a line without text is left out."""
    top: list[_Line] = []
    open_lines: list[tuple[int, _Line]] = []
    for raw in message.splitlines():
        if not raw.strip():
            continue
        indent = len(raw) - len(raw.lstrip())
        line = _Line(raw.strip().removeprefix("- "))
        while open_lines and open_lines[-1][0] >= indent:
            open_lines.pop()
        (open_lines[-1][1].below if open_lines else top).append(line)
        open_lines.append((indent, line))
    return top


def _reasons(lines: list[_Line], keys: tuple[str, ...], owner: str, kinds: str, value: str) -> Iterator[_Reason]:
    for line in lines:
        if line.text.startswith("Subtypes: "):
            kinds = line.text
        elif line.text.startswith("Given value: ") and not line.text.startswith("Given value: NestedArg("):
            value = _GOT.sub("", line.text.removeprefix("Given value: "))
    for line in lines:
        if key := _KEY.match(line.text):
            rest = [_Line(key[2])] if key[2] else []
            yield from _reasons([*rest, *line.below], (*keys, key[1]), owner, "", "")
        elif found := _CLASS.match(line.text):
            yield from _reasons(line.below, keys, found[1], kinds, value)
        elif part := _NO_PART.match(line.text):
            got = value if "NestedArg(" in part[2] else part[2]
            yield _Reason(keys, owner, f"Expected a {part[1]}", kinds, got)
        elif called := _CALLABLE.match(line.text):
            inner = _Line(called[1] if _KEY.match(called[1]) else _GOT.sub("", called[1]), line.below)
            got = _GOT.search(called[1])
            yield from _reasons([inner], keys, owner, kinds, got[0].removeprefix(". Got value: ") if got else value)
        elif line.text.startswith(_WALL):
            yield from _reasons(line.below if line.text == "Errors:" else [], keys, owner, kinds, value)
        elif not line.text.startswith(("Subtypes: ", "Given value: ")):
            text = " ".join([line.text, *_flat(line.below)])
            match = _EXPECTED.match(text)
            yield _Reason(keys, owner, text, kinds, match[2] if match and match[2] else value)


def _flat(lines: list[_Line]) -> Iterator[str]:
    for line in lines:
        yield line.text
        yield from _flat(line.below)


def _is_filler(text: str) -> bool:
    """Whether a reason holds of every value: it is not null, or not the path of a file."""
    return text.startswith(("Expected a <class 'NoneType'>", "Expected a path but ", "Expected a <class 'bool'>"))


def _plain(text: str) -> str:
    """Types as one writes them."""
    text = _TYPE.sub(lambda match: match[1].removeprefix("collections.abc."), text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", text)
    return text.replace("NoneType", "null").replace("typing.", "")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _names(path: str) -> Iterator[str]:
    """Names of the classes in use that may stand where the class of that path is wanted."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type):
        return
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        if not getattr(child, "__abstractmethods__", None) and not child.__name__.startswith("_"):
            yield child.__name__
        yield from _names(f"{child.__module__}.{child.__qualname__}")


_STARTED = ("config.yaml", "hparams.yaml")


class NewFolders:
    """Remembers which of a run's folders, and of those above them, are not there yet.

    Args:
        folders: Folders that the run will write to.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self._new = [Path(folder) for folder in folders if not Path(folder).exists()]
        above = {place for folder in self._new for place in folder.parents if not place.exists()}
        self._above = sorted(above, key=lambda place: len(place.parts), reverse=True)

    def remove(self) -> None:
        """Removes those that hold nothing but the config of the run, and then what is empty above them."""
        for folder in self._new:
            inside = list(folder.rglob("*"))
            if all(path.is_dir() or (path.parent == folder and path.name in _STARTED) for path in inside):
                for path in sorted(inside, key=lambda path: len(path.parts), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                with contextlib.suppress(FileNotFoundError):
                    folder.rmdir()
        for folder in self._above:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()


USAGE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_FLAG = "--debug"
_VARIABLE = "MOSLIM_DEBUG"
_STOPPED = (GuardError, GateError, ServerError)
_DOTTED_ERROR = re.compile(r"^[ |+-]*([A-Za-z_][\w.]*(?:Error|Exception)): ?", re.MULTILINE)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OWN = str(Path(__file__).parents[1])


@dataclass
class Failure:
    """One message and the exit status that goes with it."""

    message: str
    status: int


def without_flag(arguments: list[str]) -> list[str]:
    """Takes ``--debug`` out of a command's arguments, and notes it for this process and those that it starts."""
    if _FLAG in arguments:
        os.environ[_VARIABLE] = "1"
    return [argument for argument in arguments if argument != _FLAG]


def debugging() -> bool:
    """Whether tracebacks and full messages of libraries are to be shown."""
    return os.environ.get(_VARIABLE, "").lower() not in ("", "0", "false", "no", "off")


@contextmanager
def reported() -> Iterator[None]:
    """Ends the process with one message where a failure is known, and leaves any other exception as it is.

    Raises:
        SystemExit: With the status of the failure.
    """
    try:
        yield
    except SIGTERMException as error:
        if not _rank():
            print("stopped by SIGTERM", file=sys.stderr)
        # Lightning kills the first process when one that it started ends with another status than 0.
        raise SystemExit(TERMINATED if not _rank() else 0) from error
    except SystemExit as error:
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's exit after Ctrl-C
            raise SystemExit(INTERRUPTED) from error
        raise
    except KeyboardInterrupt as error:
        raise SystemExit(INTERRUPTED) from error
    except Exception as error:
        found = failure(error)
        if found is None:
            raise
        if debugging():
            traceback.print_exception(error)
        place = f" (process {_rank()})" if _rank() else ""
        print(f"error{place}: {found.message}", file=sys.stderr)
        raise SystemExit(found.status) from None


def failure(error: BaseException) -> Failure | None:
    """Returns what to say of an exception; None for one that needs its traceback.

    Args:
        error: The exception. A :class:`UsageError` counts also where a library wrapped it or another process raised
            it.
    """
    for part in _chain(error):
        if isinstance(part, _STOPPED):
            return Failure(f"{_own_text(part)}\n({_FLAG} shows the traceback)", FAILED)
        if isinstance(part, UsageError | MisconfigurationException):
            return Failure(_own_text(part), USAGE)
        if _out_of_memory(part):
            first = str(part).strip().splitlines()[0]
            return Failure(
                f"out of memory: {first}\nSmaller batches (data.batch_size, data.eval_batch_size), shorter texts "
                "(data.max_length), model.gradient_checkpointing or model.lora need less; docs/memory.md says more. "
                f"({_FLAG} shows the traceback)",
                FAILED,
            )
        raised = _raised_elsewhere(part)
        if raised is not None:
            return raised
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
    """Whether code of the user, neither of a library nor of this package, ran where the exception was raised."""
    return any(_is_users(name) for name in _files(error.__traceback__))


def _rank() -> int:
    return getattr(rank_zero_only, "rank", None) or 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what caused it: what was raised ``from`` another exception, never what only came after it."""
    part: BaseException | None = error
    seen: set[int] = set()
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = part.__cause__


def _own_text(error: BaseException) -> str:
    """An exception's message, without the traceback that a DataLoader's worker puts before it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _last_error(text)[1] if text.startswith("Caught ") else text


def _last_error(text: str) -> tuple[str, str]:
    """Class path and message of the exception with which a printed traceback ends."""
    found = list(_DOTTED_ERROR.finditer(text))
    return (found[-1][1], text[found[-1].end() :].strip()) if found else ("", text)


def _raised_elsewhere(error: BaseException) -> Failure | None:
    """A failure of another process, which hands over its traceback as text."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return None
    name, message = _last_error(text)
    short = name.rsplit(".", 1)[-1]
    if short in {kind.__name__ for base in _STOPPED for kind in (base, *_subclasses(base))}:
        return Failure(f"{message}\n({_FLAG} shows the traceback)", FAILED)
    if short in {kind.__name__ for kind in (UsageError, *_subclasses(UsageError), MisconfigurationException)}:
        return Failure(message, USAGE)
    return None


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        yield child
        yield from _subclasses(child)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _files(found: TracebackType | None) -> Iterator[str]:
    while found is not None:
        yield found.tb_frame.f_code.co_filename
        found = found.tb_next


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refused something, and no code of the user was running."""
    files = list(_files(error.__traceback__))
    return bool(files) and f"{os.sep}lightning{os.sep}" in files[-1] and not in_own_code(error)


def _is_users(file: str) -> bool:
    own = os.path.isabs(file) and not file.startswith((_OWN, *_LIBRARIES))  # compiled libraries have relative names
    return own and Path(file).name not in ("main.py", "moslim")  # what starts the command
