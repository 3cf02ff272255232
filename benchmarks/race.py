"""Trainers in processes of their own that take turns step by step: what else a machine does strikes them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from worlds import World

HERE = Path(__file__).resolve().parent


@dataclass
class Entrant:
    """Who takes part.

    Args:
        kind: A function of racers.py.
        settings: What it is given.
        source: Folder of another version of this project's source; None = this one.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None


class Racer:
    """A trainer in a process of its own, which does a step when told to.

    Args:
        entrant: Which.
        world: What is trained.
        folder: Where its models lie.
        steps: How many steps it will be told to do.
    """

    def __init__(self, entrant: Entrant, world: World, folder: Path, steps: int) -> None:
        own = {"racer": entrant.kind, "settings": entrant.settings, "world": asdict(world)}
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump({**own, "folder": str(folder), "steps": steps}, file)
        environment = dict(os.environ)
        if entrant.source is not None:
            environment["PYTHONPATH"] = str(entrant.source)
        self._log = open(f"{file.name}.log", "w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "racers.py"), file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def step(self) -> dict[str, Any]:
        """Does one step; seconds, phases and mean length of answers."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._line()

    def finish(self) -> float:
        """Ends it after its last step; peak memory in MiB."""
        peak: float = self._line()["peak_mb"]
        self._process.communicate()
        return peak

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args} ended early:\n{self._log.read()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def race(entrants: dict[str, Entrant], world: World, folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Lets trainers take turns; the first step of each, which warms up, does not count.

    Returns:
        By entrant: medians ``s_per_step``, ``cpu_s_per_step`` (of all threads) and ``phases``, ``mean_length``,
        ``tokens_per_s`` and ``peak_mb``.
    """
    racers = {name: Racer(entrant, world, folder, repeats + 1) for name, entrant in entrants.items()}
    laps: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
    for _ in range(repeats + 1):
        for name, racer in racers.items():
            laps[name].append(racer.step())
    return {name: _summary(laps[name][1:], racer.finish(), world) for name, racer in racers.items()}


def _summary(laps: list[dict[str, Any]], peak: float, world: World) -> dict[str, Any]:
    answers = world.prompts * world.samples
    phases = {name: round(median(lap["phases"][name] for lap in laps), 4) for name in laps[0]["phases"]}
    return {
        "s_per_step": round(median(lap["seconds"] for lap in laps), 4),
        "cpu_s_per_step": round(median(lap["cpu"] for lap in laps), 4),
        "phases": phases,
        "mean_length": round(sum(lap["length"] for lap in laps) / len(laps), 1),
        "tokens_per_s": round(median(answers * lap["length"] / lap["seconds"] for lap in laps), 1),
        "peak_mb": round(peak, 1),
    }


def in_turns(repeats: int, **contestants: Callable[[int], object]) -> dict[str, float]:
    """Median seconds of functions that are called in turns, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function(number)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(own[1:]) for name, own in seconds.items()}
