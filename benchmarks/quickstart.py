"""Question: does `make quickstart` give a steerable policy within its time, for every seed, and is it real control?

    python benchmarks/quickstart.py --seeds 0 1 2

Runs the commands of `make quickstart` for every seed, the scrambled control after each (same starter and classifier,
requested levels exchanged between prompts), and the first of them once more, to see that it gives the same result. A
seed that the result file has already, from the same configs, is not run again. One whose stage fails is recorded under
`failed`, and the next one is run.
Last result: benchmarks/results/quickstart.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from cells import POLICY, SCRAMBLED, quickstart_key
from common import RESULTS, ROOT, circumstances, kept, write

REPORT = ROOT / "outputs/quickstart/report/steerability.json"
CONTROL = ROOT / "outputs/quickstart/scrambled/report/steerability.json"
LAYERS = f"--config {POLICY} --config {SCRAMBLED}"
ADDED = ("classifier", "seconds")
"""What a seed's result holds besides the contents of its steerability.json."""


def commands(seed: int) -> list[list[str]]:
    """The quickstart's own commands, as make would run them."""
    recipe = subprocess.run(
        ["make", "--dry-run", "--silent", "quickstart", f"SEED={seed}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [shlex.split(line) for line in recipe.splitlines() if "main.py" in line]


class StageFailed(Exception):
    """A command ended with an error: most often a gate that was not passed."""


def timed(command: list[str]) -> float:
    """Runs a command and returns the seconds it took."""
    print("+", shlex.join(command), flush=True)
    start = time.perf_counter()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise StageFailed(name_of(command))
    return round(time.perf_counter() - start, 1)


def name_of(command: list[str]) -> str:
    """``reward fit`` for ``python main.py fit --config configs/quickstart/reward.yaml``."""
    configs = [command[i + 1] for i, word in enumerate(command) if word == "--config"]
    return f"{Path(configs[-1]).stem} {command[2]}"


def quickstart(seed: int) -> dict[str, Any]:
    """One whole quickstart: the contents of its steerability.json plus the seconds of each stage."""
    start = time.time()
    seconds = {name_of(command): timed(command) for command in commands(seed)}
    seconds["total"] = round(sum(seconds.values()), 1)
    return {**json.loads(REPORT.read_text()), "classifier": classifier(start), "seconds": seconds}


def classifier(since: float) -> dict[str, Any]:
    """What the newest classifier since a moment reached in validation: subset to dimension to measure; may be empty."""
    files = (ROOT / "outputs/quickstart/reward").glob("version_*/metrics.csv")
    runs = [path for path in files if path.stat().st_mtime >= since]
    if not runs:
        return {}
    with max(runs, key=lambda path: path.stat().st_mtime).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    found: dict[str, Any] = {}
    for key, value in (rows[-1] if rows else {}).items():
        parts = key.split("/")
        if len(parts) == 4 and parts[2] != "mean" and value:
            found.setdefault(parts[1], {}).setdefault(parts[2], {})[parts[3]] = round(float(value), 4)
    return found


def control(seed: int) -> dict[str, Any]:
    """The scrambled run on what the last quickstart left."""
    python, main = commands(seed)[0][:2]
    for stage in (f"fit {LAYERS}", f"test {LAYERS} --ckpt_path last"):
        timed([python, main, *stage.split(), "--seed_everything", str(seed)])
    return json.loads(CONTROL.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "quickstart.json")
    parser.add_argument("--no-repeat", action="store_true", help="leave out the second run of a seed")
    args = parser.parse_args()
    key = quickstart_key(SCRAMBLED)
    before = kept(args.out, key) or {"scrambled": {}}
    result: dict[str, Any] = {**circumstances(), "key": key, "scrambled": before["scrambled"]}
    for seed in map(str, args.seeds):
        start = time.time()
        try:
            if seed in before and seed in before["scrambled"]:
                result[seed] = before[seed]
                continue
            result[seed] = quickstart(int(seed))
            result["scrambled"][seed] = control(int(seed))
        except StageFailed as stage:
            result.setdefault("failed", {})[seed] = {"stage": str(stage), "classifier": classifier(start)}
        write(args.out, result)
    passed = [seed for seed in map(str, args.seeds) if seed in result]
    if passed and not args.no_repeat:
        again, first = quickstart(int(passed[0])), result[passed[0]]
        same = all(again[name] == value for name, value in first.items() if name not in ADDED)
        result["repeat"] = {"seed": int(passed[0]), "identical": same, "seconds": again["seconds"]}
    write(args.out, result)


if __name__ == "__main__":
    main()
