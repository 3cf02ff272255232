"""Question: how often does the policy meet several requested levels at once, and what lifts it?

    python benchmarks/joint.py

The quickstart's policy and the layers in configs/experiment/joint/ over it, at full length, on the fold that the
quickstart reports on. The recipe was chosen on another fold. Each seed has its own starter and classifier, and each
finished run is a file in benchmarks/results/joint/, recognised by a hash of its configs: the work goes on where it
stopped.
Last result: benchmarks/results/joint.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

from cells import DEFAULT, arms, failures, run_arms
from common import circumstances, write

FOLD = 0


def main() -> None:
    out, cells = run_arms(__doc__, [DEFAULT, *arms()["joint"]], "joint", FOLD)
    runs: dict[str, dict[str, Any]] = {}
    for arm, of_arm in cells.items():
        results = {str(cell.world.seed): cell.kept for cell in of_arm}
        runs[arm] = {seed: result for seed, result in results.items() if result and "failed" not in result}
    finished = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    write(out, {**circumstances(), "runs": finished, "failed": failures(cells)})


if __name__ == "__main__":
    main()
