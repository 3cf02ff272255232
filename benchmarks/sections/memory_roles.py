"""Section on benchmarks/memory_roles.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, table

MIB = 2**20


def section(result: dict[str, Any]) -> str:
    """Weights and peaks of every form, then of the shared form's roles."""
    forms = [
        [
            name,
            f"{result['copies'][name]:.2f}",
            f"{found['weights'] / MIB:.0f}",
            f"{result['shared_to'][name]:.2f}" if name in result["shared_to"] else "1",
            f"{found['resident'] / MIB:.0f}",
            f"{found['peak'] / MIB:.0f}" if "peak" in found else "-",
        ]
        for name, found in result["forms"].items()
    ]
    roles = [
        [form, role, *(f"{row[column] / MIB:.1f}" for column in ("alone", "added")), f"{row['peak'] / MIB:.0f}"]
        for form in ("shared", "full")
        for role, row in result["forms"][form]["roles"].items()
    ]
    return f"""
## One backbone for all roles

{circumstances_line(result)}
PPO on a Llama of {result["base_parameters"] / 1e6:.0f} million random float32 weights
({result["base_bytes"] / MIB:.0f} MiB). `shared`: one base with adapters of policy and classifier, the base alone as
reference, and the critic as a head. `classifier apart`: the same, with the classifier merged. `full`: all weights are
trained, and the reference is a copy. `four models`: as `full`, with a critic of its own backbone. In MiB: `weights` are
counted by storage; `resident` is the growth of the process by loading and reading them; `peak` is that of the whole
process in the first training step. Wanted: {result["wanted"]}.

{table(["form", "copies of the base", "weights", "shared form's share", "resident", "peak"], forms)}
By role: `alone` counts all its weights, `added` those that no role above holds, and `peak` is that while the role
works. The policy's peak includes gradients and optimizer states: without LoRA, those of all weights.

{table(["form", "role", "alone", "added", "peak"], roles)}"""
