"""Section on benchmarks/unchanged.py."""

from __future__ import annotations

from typing import Any

from cells import quickstart_key
from common import circumstances_line, outdated, table


def section(result: dict[str, Any]) -> str:
    """How many numbers of two commits were compared, and how many differ."""
    rows = []
    for stage, found in result["stages"].items():
        lacking = len(found["only_before"]) + len(found["only_after"])
        counts = (found["numbers"], found["texts"], len(found["different"]), lacking)
        rows.append([stage, *(f"{count:,}" for count in counts)])
    commits, seeds = result["commits"], result["seeds"]
    changed = [f"`{one['name']}`" for found in result["stages"].values() for one in found["different"][:10]]
    both = (f"commit {commits[side]} with seed {seeds[side]}" for side in ("before", "after"))
    stale = outdated(result["key"], quickstart_key(*result["configs"]))
    return f"""
## Results unchanged

{circumstances_line(result)}
{stale}Comparison of {" and ".join(both)}: `make quickstart`, the test of its
classifier, and {result["steps"]} steps of each policy optimizer. Reports, logged metrics, weights and texts must be
bitwise equal; measured times are not compared.

{table(["runs", "numbers compared", "texts compared", "different", "on one side only"], rows)}{_list(changed)}"""


def _list(changed: list[str]) -> str:
    return f"\nDifferent, among others: {', '.join(changed)}.\n" if changed else ""
