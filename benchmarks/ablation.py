"""Question: is the quickstart's policy better with another part in the place of one of its own?

    make ablation

One factor at a time: every config in configs/experiment/ over the quickstart's policy, three seeds, each with a starter
and a classifier of its own. A cell makes a third of the quickstart's rollouts or less, with a schedule as short, and
every arm as many answers. They are measured on another fold than the one that the quickstart reports on, so that its
parts may be chosen by the outcome. Each finished cell is a file in benchmarks/results/ablation/, recognised by a hash
of its configs: the work goes on where it stopped.
Last result: benchmarks/results/ablation.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cells import DEFAULT, Cell, World, arms, finish
from common import RESULTS, circumstances, write

FOLD = 1
ROLLOUTS = 88


def figures(result: dict[str, Any]) -> dict[str, float]:
    """What arms are compared by."""
    default = result["default_quality"]
    return {
        **{name: result["mean"][name] for name in ("spearman", "exact", "mae")},
        "joint_exact": result["combinations"]["seen"]["joint_exact"],
        "default_shift": max(abs(after - default["before"][name]) for name, after in default["after"].items()),
        "gap": result["reward"]["gap"]["after"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    factors = {DEFAULT: [DEFAULT], **arms()}
    every = [arm for names in factors.values() for arm in names]
    parser.add_argument("--arms", nargs="+", default=every, choices=every, metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="no cell is begun after these")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    args = parser.parse_args()
    cells = {arm: [Cell(arm, World(seed, FOLD), "ablation", ROLLOUTS) for seed in args.seeds] for arm in every}
    by_seed = zip(*(cells[arm] for arm in args.arms), strict=True)
    finish([cell for row in by_seed for cell in row], args.jobs, args.limit_minutes)

    found: dict[str, Any] = {factor: {arm: {} for arm in names} for factor, names in factors.items()}
    failed = {}
    for factor, names in factors.items():
        for cell in (cell for arm in names for cell in cells[arm]):
            result, seed = cell.kept or {}, str(cell.world.seed)
            if "failed" in result:
                failed[f"{cell.arm}, seed {seed}"] = result["failed"]
            elif result:
                found[factor][cell.arm][seed] = figures(result)
    sizes = {"rollouts": ROLLOUTS, "answers": cells[DEFAULT][0].answers}
    write(args.out, {**circumstances(), **sizes, "factors": found, "failed": failed})


if __name__ == "__main__":
    main()
