"""Question: what share of a quickstart step do logging, guards and dashboards cost, with everything on?

    python benchmarks/logging_overhead.py

The quickstart's policy is trained with everything on (W&B offline, CSV, progress bar, throughput, guards, completion
table, gold metrics) and with nothing logged at all. The two take turns step by step, on the same answers, so that each
step is compared with its twin a second later. What W&B's own process does between steps falls on both alike. An earlier
form compared whole runs of 104 steps, of which runs of one kind differed by up to 13%: it said 5.6% before metrics were
left out of the steps that nobody sees, and 6.1% after.
Last result: benchmarks/results/logging_overhead.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from cells import World
from common import RESULTS, ROOT, circumstances, write
from race import Racer

ARMS = ("on", "off")
WARM_UP = 4
WORLD = World(seed=0, fold=0)


def main() -> None:
    """Lets both take turns and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of each, after those that warm up; below 395")
    parser.add_argument("--out", type=Path, default=RESULTS / "logging_overhead.json")
    options = parser.parse_args()
    WORLD.make()
    folder = ROOT / "outputs/logging_overhead"
    folder.mkdir(parents=True, exist_ok=True)
    common = {"folder": str(folder), "world": asdict(WORLD)}
    racers = {arm: Racer("logging_racer.py", {"arm": arm, **common}, folder) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(WARM_UP + options.steps):
        for arm in ARMS if number % 2 else reversed(ARMS):
            seconds[arm].append(racers[arm].step()["seconds"])
    for racer in racers.values():
        racer.stop()
    on, off = (seconds[arm][WARM_UP:] for arm in ARMS)
    differences = [a - b for a, b in zip(on, off, strict=True)]
    result = {
        **circumstances(),
        "share_of_step": round(mean(differences) / mean(off), 4),
        "half_interval": round(1.96 * stdev(differences) / len(off) ** 0.5 / mean(off), 4),
        "seconds_per_step": {"on": round(mean(on), 5), "off": round(mean(off), 5)},
        "steps": len(on),
        "wanted": "< 0.03",
    }
    write(options.out, result)
    shown = (100 * result[key] for key in ("share_of_step", "half_interval"))
    print("logging costs {:.2f}% of a step, give or take {:.2f}".format(*shown))


if __name__ == "__main__":
    main()
