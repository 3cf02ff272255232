"""Section on benchmarks/resume_matrix.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table


def section(result: dict[str, Any]) -> str:
    """Which runs equal the uninterrupted one after they were stopped and resumed."""
    cells: dict[str, bool] = result["cells"]
    optimizers, stops, processes = (
        list(dict.fromkeys(parts)) for parts in zip(*(c.split("/") for c in cells), strict=True)
    )
    columns = [(stop, count) for count in processes for stop in stops]
    shown = {None: "-", True: "equal", False: "**differs**"}
    rows = [[name, *(shown[cells.get(f"{name}/{stop}/{count}")] for stop, count in columns)] for name in optimizers]
    return f"""
## Stopped and resumed

{circumstances_line(result)}
Bitwise comparison with the uninterrupted run of {result["steps"]} optimizer steps: every batch's loss, requests,
tokens, advantages and the weights after it, in every process; and the last checkpoint with optimizer, schedule, running
statistics, KL coefficient, sampler and rollout. Signals arrive at random moments, checkpoints are written every second
step, and a step accumulates {result["batches_per_step"]} batches.

{table(["optimizer", *(f"{stop}, {count} proc." for stop, count in columns)], rows)}"""
