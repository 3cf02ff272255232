"""How a trainer in a process of its own takes turns with others, see race.py. It imports little: memory is measured."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[..., None]


def wait() -> float:
    """Waits for the word to go, and returns the time."""
    if not sys.stdin.readline():
        os._exit(0)  # the parent has gone or has seen enough
    return time.perf_counter()


def take_part(train: Callable[[dict[str, Any], Report], None]) -> None:
    """Trains by the specification that the command line names, and says at the end how much memory that took.

    Args:
        train: Is given the specification, and what to report the figures of a step with.
    """
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def report(**values: Any) -> None:
        print(json.dumps(values), file=output, flush=True)

    train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), report)
    report(peak_mb=peak_kib() / 1024)


def peak_kib() -> int:
    """Most memory that was resident; the operating system's usual count begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
