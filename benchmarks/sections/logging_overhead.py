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
The quickstart's policy with W&B offline, CSV, progress bar, throughput, guards, table of completions and gold metrics,
against the same training without them. The two take turns, step by step, on the same completions: means over
{result["steps"]} steps, with the 95% interval of the difference. W&B's own process slows both alike. A step is one of
the four optimizer steps per rollout.

{table(["share of a step (at most 0.03)", "seconds per step with", "without"], [row])}"""
