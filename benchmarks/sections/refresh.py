"""Section on benchmarks/refresh.py."""

from __future__ import annotations

from typing import Any

from cells import REFRESH, quickstart_key
from common import circumstances_line, outdated, table

KINDS = {"fresh": "topics of training, new completions", "held_out": "held-out topics"}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    before, after = result["before"], result["after"]
    note = outdated(result.get("key", ""), quickstart_key(REFRESH))
    tricks = (part["fresh"]["subsets"]["adversarial"] for part in (before, after))
    return f"""
## Refresh

{circumstances_line(result)}
{note}The classifier (seed {result["seed"]}) is trained further on completions of its policy, labelled by the gold
scorer. Gap: its probability of the requested level minus the share of completions with this level, on the same
completions before and after. Above 0 it overrates them, below 0 it underrates them. In brackets: 95% interval over
questions.

{table(["answers", "dimension", "gold", "proxy before", "after", "gap before", "gap after"], _gaps(before, after))}
Accuracy, mean over dimensions, before and after: {_accuracies(before, after)}; on the adversarial file
{" and ".join(f"{value:.3f}" for value in tricks)}.
"""


def _gaps(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    rows = []
    for kind, title in KINDS.items():
        old, new = (_parts(part[kind]["requests"]) for part in (before, after))
        for name in old:
            proxies = [f"{part[name]['proxy']:.3f}" for part in (old, new)]
            rows.append([title, name, f"{old[name]['gold']:.3f}", *proxies, _gap(old[name]), _gap(new[name])])
    return rows


def _parts(requests: dict[str, Any]) -> dict[str, Any]:
    return {**requests["dimensions"], "**mean**": requests["mean"]}


def _gap(part: dict[str, Any]) -> str:
    low, high = part["interval"]
    return f"{part['gap']:.3f} [{low:.3f}, {high:.3f}]"


def _accuracies(before: dict[str, Any], after: dict[str, Any]) -> str:
    pairs = {kind: [part[kind] for part in (before, after)] for kind in KINDS}
    values = {kind: [x["subsets"].get("samples", x["accuracy"]) for x in pair] for kind, pair in pairs.items()}
    return "; ".join(f"{KINDS[kind]} {old:.3f} and {new:.3f}" for kind, (old, new) in values.items())
