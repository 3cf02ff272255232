"""Section on benchmarks/devices.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table


def section(result: dict[str, Any]) -> str:
    """How far two processes stray from one that sees the same batches."""
    wanted: float = result["wanted"]
    rows = []
    for cell, found in result["cells"].items():
        model, optimizer, strategy = cell.split("/")
        largest = f"{found['largest']:.1e}"
        answers = "identical" if found["same_answers"] else "**differ**"
        rows.append(
            [model, optimizer, strategy, answers, largest if found["largest"] <= wanted else f"**{largest} (missed)**"]
        )
    return f"""
## Two processes against one

{circumstances_line(result)}
{result["steps"]} steps of SGD at a rate of 0.1 in float64: a batch in one process against its halves in two (CPU, gloo;
`configs/trainer/`). The completions of every step must be the same, and no weight may differ by more than {wanted:g}
after any step. Llama runs with `model.forward_config.share_prefixes: never`: transformers computes its norms in float32
for all dtypes, passes of other shapes round differently, and the steps amplify it. GPT-2 computes in float64
throughout, with the default options.

{table(["model", "optimizer", "strategy", "completions", "largest difference"], rows)}"""
