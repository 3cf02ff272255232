"""Errors of a command as one message and an exit status.

The statuses: 2 for a mistake that the user can mend, 1 for a run that failed, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moslim.callbacks.gate import GateError
from moslim.callbacks.guards import GuardError
from moslim.errors import UsageError
from moslim.policy.engines.vllm_client import ServerError

USAGE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_FLAG = "--debug"
_VARIABLE = "MOSLIM_DEBUG"
_STOPPED = (GuardError, GateError, ServerError)
_DOTTED_ERROR = re.compile(r"^[ |+-]*([A-Za-z_][\w.]*(?:Error|Exception)): ?", re.MULTILINE)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OWN = str(Path(__file__).parent)


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
