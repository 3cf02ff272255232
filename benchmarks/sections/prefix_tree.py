"""Section on benchmarks/prefix_tree.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    rows = [
        [size, part, f"{seconds['with']:.3f}", f"{seconds['without']:.3f}", f"{seconds['ratio']:.2f}"]
        for size, found in result["sizes"].items()
        for part, seconds in found["parts"].items()
    ]
    text = f"""
## Prefix tree

{circumstances_line(result)} {result["threads"]} threads. The same rollout in one process, in turns: shared
prefixes are computed once (`model.forward_config.share_prefixes: always`) or for every completion (`never`). All other
options are the same. Update: forward and backward pass of the policy; reference: its pass; reward: level probabilities
of the classifier. Seconds are medians; the ratio is without over with.

"""
    text += table(["size", "part", "with, s", "without, s", "ratio"], rows)
    for size, found in result["sizes"].items():
        tokens = found["tokens"]
        text += (
            f"\n{size.capitalize()}: the policy computes {tokens['with']} tokens in place of {tokens['without']}; "
            f"log-probabilities differ by at most {found['difference']:.1e}.\n"
        )
    return text
