"""Question: what does each policy optimizer reach on the quickstart's task, with as many rollouts as it has?

    python benchmarks/optimizers.py --out benchmarks/results/optimizers.json

Trains the policy of `make quickstart` once with every optimizer, from the same starter and classifier: RLOO as the
quickstart's own config has it, the others as configs/experiment/optimizer/ says. Only the optimizer's options
differ, and PPO passes over each rollout twice.
What was run before with the same configs is not repeated, see ablation.py.
Last result: benchmarks/results/optimizers.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cells import DEFAULT, Cell, World, finish
from common import RESULTS, circumstances, write

ARMS = {
    "RLOO": DEFAULT,
    "REINFORCE++": "optimizer/reinforce_plus_plus",
    "GRPO": "optimizer/grpo",
    "PPO": "optimizer/ppo",
    "Online DPO": "optimizer/online_dpo",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, default=0, help="which topics are held out; 0 is reported, tune on another")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="no run is begun after these")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    args = parser.parse_args()
    world = World(args.seed, args.fold)
    cells = {name: Cell(ARMS[name], world, "optimizers") for name in args.names}
    finish(list(cells.values()), args.jobs, args.limit_minutes)
    found = {name: cell.kept for name, cell in cells.items() if cell.kept}
    write(args.out, {**circumstances(), "seed": args.seed, "fold": args.fold, **found})


if __name__ == "__main__":
    main()
