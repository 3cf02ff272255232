"""Section on benchmarks/optimizers.py."""

from __future__ import annotations

from typing import Any

from cells import Cell, World
from common import circumstances_line, met, outdated, table
from optimizers import ARMS


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    runs = {name: run for name, run in result.items() if isinstance(run, dict) and "dimensions" in run}
    rows = [
        [
            name,
            met(run["mean"]["spearman"], ">= 0.8"),
            f"{min(d['spearman'] for d in run['dimensions'].values()):.3f}",
            f"{run['mean']['exact']:.3f}",
            f"{run['mean']['within_one']:.3f}",
            f"{run['mean']['mae']:.3f}",
            f"{run['reward']['gap']['after']:.3f}",
            f"{run['tokens'] / 1e6:.2f}",
            f"{run['seconds']:.0f}",
        ]
        for name, run in runs.items()
    ]
    world = World(result["seed"], result["fold"])
    old = [outdated(run["key"], Cell(ARMS[name], world, "optimizers").key) for name, run in runs.items()]
    note = max(old, default="")
    stopped = {name: run["failed"] for name, run in result.items() if isinstance(run, dict) and "failed" in run}
    failed = "".join(f"\n{name} failed: {why}\n" for name, why in stopped.items())
    header = ["optimizer", "mean Spearman (>= 0.8)", "lowest", "exact", "within one", "MAE", "proxy minus gold"]
    header += ["million tokens sampled", "seconds of fit"]
    return f"""
## Policy optimizers

{circumstances_line(result)}
{note}The policy stage of the quickstart with each optimizer, seed {result["seed"]}: the same number of
rollouts, options not tuned. PPO passes over each rollout twice, so it makes twice as many optimizer steps.

{table(header, rows)}{failed}"""
