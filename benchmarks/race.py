"""Trainers in processes of their own that take turns step by step: what else a machine does strikes them all.

Each is told on its input to go on, and says on its output, in lines of JSON, what every step took, and at the end how
much memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer
from worlds import KL, RATE, World, data_of

from moslim.data.loader import RepeatBatchSampler
from moslim.data.prompt_batches import SampledPrompts
from moslim.data.types import RowKind, Split

HERE = Path(__file__).resolve().parent


@dataclass
class Entrant:
    """Who takes part.

    Args:
        kind: ``ours``, ``earlier`` (racers.py) or ``trl`` (trl_racer.py).
        settings: What it is given.
        source: Folder of another version of this project's source; None = this one.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None


class Racer:
    """A trainer in a process of its own, which does a step when told to.

    Args:
        script: File beside this one, see turn.py.
        specification: What it is told.
        folder: Where that, and what it prints, is written.
        source: Folder of another version of this project's source; None = this one.
    """

    def __init__(self, script: str, specification: dict[str, Any], folder: Path, source: Path | None = None) -> None:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump(specification, file)
        environment = dict(os.environ)
        if source is not None:
            environment["PYTHONPATH"] = str(source)
        self._log = open(f"{file.name}.log", "w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def step(self) -> dict[str, Any]:
        """Does one step; what it reports of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._line()

    def finish(self) -> float:
        """Ends it after its last step; peak memory in MiB."""
        peak: float = self._line()["peak_mb"]
        self.stop()
        return peak

    def stop(self) -> None:
        """Ends it wherever it is."""
        self._process.communicate()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args} ended early:\n{self._log.read()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def asked(world: World, folder: Path, steps: int) -> list[list[dict[str, str]]]:
    """The prompts of our run, in its order, as chats.

    Raises:
        ValueError: TRL would make other tokens of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    data = data_of(world)
    renderer = data.renderer(tokenizer)
    rows = data.rows(RowKind.PROMPTS, Split.TRAIN)
    prompts = SampledPrompts(rows, data.preferences, data.sampler, data.source, data.seed)
    order = RepeatBatchSampler(len(rows), data.batch_size, data.seed)
    chats = []
    for prompt in (prompts[draw] for batch in islice(order, steps) for draw in batch):
        chats.append(renderer.messages(prompt.question, prompt.preference))
        theirs = tokenizer.apply_chat_template(chats[-1], add_generation_prompt=True)["input_ids"]
        if theirs != renderer.ids(prompt.question, prompt.preference):
            raise ValueError(f"the trainers would be given different tokens for {chats[-1]}")
    return chats


def race(entrants: dict[str, Entrant], world: World, folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Lets trainers take turns; the first step of each, which warms up, does not count.

    Returns:
        By entrant: medians ``s_per_step``, ``cpu_s_per_step`` (of all threads) and ``phases``, ``mean_length``,
        ``tokens_per_s`` and ``peak_mb``.
    """
    racers = {name: _racer(entrant, world, folder, repeats + 1) for name, entrant in entrants.items()}
    durations: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
    for _ in range(repeats + 1):
        for name, racer in racers.items():
            durations[name].append(racer.step())
    return {name: _summary(durations[name][1:], racer.finish(), world) for name, racer in racers.items()}


def _racer(entrant: Entrant, world: World, folder: Path, steps: int) -> Racer:
    specification = {
        "racer": entrant.kind,
        "settings": entrant.settings,
        "world": asdict(world),
        "folder": str(folder),
        "steps": steps,
    }
    script = "racers.py"
    if entrant.kind == "trl":
        script = "trl_racer.py"
        specification |= {"rate": RATE, "kl": KL, "chats": asked(world, folder, steps)}
    return Racer(script, specification, folder, entrant.source)


def _summary(durations: list[dict[str, Any]], peak: float, world: World) -> dict[str, Any]:
    answers = world.prompts * world.samples
    phases = {name: round(median(lap["phases"][name] for lap in durations), 4) for name in durations[0]["phases"]}
    return {
        "s_per_step": round(median(lap["seconds"] for lap in durations), 4),
        "cpu_s_per_step": round(median(lap["cpu"] for lap in durations), 4),
        "phases": phases,
        "mean_length": round(sum(lap["length"] for lap in durations) / len(durations), 1),
        "tokens_per_s": round(median(answers * lap["length"] / lap["seconds"] for lap in durations), 1),
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
