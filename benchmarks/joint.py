"""Question: how often does the policy meet several requested levels at once, and what lifts it?

    python benchmarks/joint.py

The quickstart's policy and the layers in configs/experiment/joint/ over it, at full length, on the fold that the
quickstart reports on. The recipe was chosen on another fold. Each seed has its own starter and classifier, and each
finished run is a file in benchmarks/results/joint/, recognised by a hash of its configs: the work goes on where it
stopped.
Last result: benchmarks/results/joint.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cells import DEFAULT, Cell, World, arms, finish
from common import RESULTS, circumstances, write

FOLD = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [DEFAULT, *arms()["joint"]]
    parser.add_argument("--arms", nargs="+", default=every, choices=every, metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="no run is begun after these")
    parser.add_argument("--out", type=Path, default=RESULTS / "joint.json")
    args = parser.parse_args()
    cells = {arm: [Cell(arm, World(seed, FOLD), "joint") for seed in args.seeds] for arm in every}
    by_seed = zip(*(cells[arm] for arm in args.arms), strict=True)
    finish([cell for row in by_seed for cell in row], args.jobs, args.limit_minutes)

    runs: dict[str, dict[str, Any]] = {}
    for arm in every:
        results = {str(cell.world.seed): cell.kept for cell in cells[arm]}
        runs[arm] = {seed: result for seed, result in results.items() if result and "failed" not in result}
    write(args.out, {**circumstances(), "runs": {arm: by_seed for arm, by_seed in runs.items() if by_seed}})


if __name__ == "__main__":
    main()
