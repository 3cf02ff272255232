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
{result["steps"]} steps of SGD at a rate of 0.1, all in float64: the batch of one process against halves of it in two
(CPU, gloo; `configs/trainer/`). Sampled answers at every step, and the largest difference of a weight after any; wanted
are the same answers and at most {wanted:g}. With Llama, what texts begin with is computed for each of them
(`model.forward_config.share_prefixes: never`):
transformers computes its norms in float32, whatever the weights are,
which two processes, whose passes have other shapes, round otherwise, and twenty such steps make much of it. GPT-2
computes in float64 throughout, with all passes as they are shipped.

{table(["model", "optimizer", "strategy", "answers", "largest difference"], rows)}"""
