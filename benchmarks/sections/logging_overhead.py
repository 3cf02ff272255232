"""Section on benchmarks/logging_overhead.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, met, table


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    seconds = result["seconds_per_step"]
    share = f"{met(result['share_of_step'], '<= 0.03')} ± {result['half_interval']:.3f}"
    row = [share, f"{seconds['on']:.4f}", f"{seconds['off']:.4f}"]
    return f"""
## Cost of logging

{circumstances_line(result)}
The quickstart's policy with W&B offline, CSV, progress bar, throughput, guards, table of answers and gold metrics,
against the same training without any of these. The two take turns, step by step, on the same answers: means over
{result["steps"]} steps, with the 95% interval of the difference. What W&B's own process does between steps falls on
both. A step is one of the four optimizer steps that are made of a rollout. Before the numbers of a step went to the
loggers in one row, and each through Lightning's `log` instead, which takes half a millisecond, the share was
0.040 ± 0.009, on a machine on which a step took 0.088 s. An earlier form of this benchmark compared whole runs, of
which two of one kind differed by up to 13%.

{table(["share of a step (at most 0.03)", "seconds per step with", "without"], [row])}"""
