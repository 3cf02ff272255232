"""Section on benchmarks/logging_overhead.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, met, table


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    seconds = result["seconds_per_step"]
    row = [met(result["share_of_step"], "<= 0.03"), f"{seconds['on']:.4f}", f"{seconds['off']:.4f}"]
    runs = len(result["runs"]["on"])
    return f"""
## Cost of logging

{circumstances_line(result)}
The quickstart's policy with W&B offline, CSV, progress bar, gauges, guards, table of answers and gold metrics, against
the same training without any of these; {result["steps"]} steps, each step's median over {runs} runs of each kind, in
turn.

{table(["share of a step (at most 0.03)", "seconds per step with", "without"], [row])}"""
