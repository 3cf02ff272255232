"""Question: is the quickstart's policy better with another part in the place of one of its own?

    make ablation

One factor at a time: every config in configs/experiment/ over the quickstart's policy, three seeds, each with a starter
and a classifier of its own. A cell makes a third of the quickstart's rollouts, with a schedule as short, and every arm
as many answers. They are measured on another fold than the one that the quickstart reports on, so that its parts may
be chosen by the outcome. Each finished cell is a file in benchmarks/results/cells/, recognised by a hash of its
configs: the work goes on where it stopped.
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
PART = 3


def figures(result: dict[str, Any]) -> dict[str, float]:
    """What arms are compared by."""
    default = result["default_quality"]
    return {
        **{name: result["mean"][name] for name in ("spearman", "exact", "mae")},
        "lowest": min(dimension["spearman"] for dimension in result["dimensions"].values()),
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
    worlds = [World(seed, FOLD) for seed in args.seeds]
    finish([Cell(arm, world, PART) for world in worlds for arm in args.arms], args.jobs, args.limit_minutes)

    found: dict[str, Any] = {factor: {} for factor in factors}
    for factor, names in factors.items():
        for arm in names:
            kept = {str(world.seed): Cell(arm, world, PART).kept for world in worlds}
            found[factor][arm] = {seed: figures(result) for seed, result in kept.items() if result is not None}
    default = Cell(DEFAULT, worlds[0], PART)
    write(args.out, {**circumstances(), "rollouts": default.rollouts, "answers": default.answers, "factors": found})


if __name__ == "__main__":
    main()
