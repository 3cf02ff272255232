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
The quickstart's policy with W&B offline, CSV, progress bar, gauges, guards, table of answers and gold metrics, against
the same training without any of these. The two take turns, step by step, on the same answers: means over
{result["steps"]} steps, with the 95% interval of the difference. What W&B's own process does between steps falls on
both. A step is one of the four optimizer steps that are made of a rollout. Logging costs about 14 ms for each
rollout, most of it in Lightning's `log`, half a millisecond for every number. While a rollout made a single step,
which took 1.2 s on a slower machine, the share was 0.014 ± 0.015; an earlier form of this benchmark, which compared
whole runs one after the other, had said 0.056 and 0.061 of it, where runs of one kind differed by up to 13%.

{table(["share of a step (at most 0.03)", "seconds per step with", "without"], [row])}"""
