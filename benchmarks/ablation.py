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

from typing import Any

from cells import DEFAULT, arms, failures, run_arms
from common import circumstances, default_shift, write

FOLD = 1
ROLLOUTS = 88


def figures(result: dict[str, Any]) -> dict[str, float]:
    """What arms are compared by."""
    return {
        **{name: result["mean"][name] for name in ("spearman", "exact", "mae")},
        "joint_exact": result["combinations"]["seen"]["joint_exact"],
        "default_shift": default_shift(result),
        "gap": result["reward"]["gap"]["after"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
    }


def main() -> None:
    factors = {DEFAULT: [DEFAULT], **arms()}
    out, cells = run_arms(__doc__, [arm for names in factors.values() for arm in names], "ablation", FOLD, ROLLOUTS)

    found: dict[str, Any] = {factor: {arm: {} for arm in names} for factor, names in factors.items()}
    for factor, names in factors.items():
        for cell in (cell for arm in names for cell in cells[arm]):
            result = cell.kept or {}
            if result and "failed" not in result:
                found[factor][cell.arm][str(cell.world.seed)] = figures(result)
    sizes = {"rollouts": ROLLOUTS, "answers": cells[DEFAULT][0].answers}
    write(out, {**circumstances(), **sizes, "factors": found, "failed": failures(cells)})


if __name__ == "__main__":
    main()
