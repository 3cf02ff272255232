"""Runs of the command line in processes that start at once, because they are forks of one that has imported it all."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from moslim.cli import run


class Launch:
    """One command in one or more processes, which find each other by torchrun's environment variables.

    Args:
        command: Arguments of ``main.py``.
        count: Number of processes.
        log: File that receives what they print.
    """

    def __init__(self, command: list[str], count: int, log: Path) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
        self.ids: list[int] = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(count)}
                _become(command, {**address, **ranks, "TORCHELASTIC_RUN_ID": "fork"} if count > 1 else {}, log)
            self.ids.append(child)
        self.codes: list[int] = []

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every process, as torchrun and SLURM do."""
        for child in self.ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def wait(self, limit: float) -> list[int]:
        """Exit codes; negative where a signal ended a process.

        Raises:
            TimeoutError: They run longer than ``limit`` seconds. They are killed.
        """
        end = time.monotonic() + limit
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"processes {self.ids} did not end within {limit:.0f} s")
            time.sleep(0.01)
        return self.codes

    def running(self) -> bool:
        """Whether one is left."""
        for child in list(self.ids):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.ids.remove(child)
                self.codes.append(os.waitstatus_to_exitcode(status))
        return bool(self.ids)


def _become(command: list[str], environment: dict[str, str], log: Path) -> None:
    """The child's whole life."""
    code = 1
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        run(command)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
