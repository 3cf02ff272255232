"""Section on benchmarks/joint.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from cells import Cell, World
from common import circumstances_line, default_shift, outdated, table
from joint import FOLD

COUNT_HEADER = ["requested", "seen: all exact", "unseen: all exact"]
DIMENSION_HEADER = ["dimension", "seen: exact", "unseen: exact", "single requests", "classifier agrees"]
FORCED = {"verbosity", "helpfulness"}
"""Dimensions of which the embedded world lets none move without the other: right steps are sentences."""


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    runs: dict[str, dict[str, dict[str, Any]]] = result["runs"]
    header = [
        *("policy", "seeds", "seen: all exact", "unseen: all exact", "MAE seen", "MAE unseen", "Spearman", "exact"),
        *("cross-talk", "shift", "training, s"),
    ]
    rows = [[arm.split("/")[-1], ", ".join(by_seed), *figures(list(by_seed.values()))] for arm, by_seed in runs.items()]
    notes = (
        outdated(run["key"], Cell(arm, World(int(seed), FOLD), "joint").key)
        for arm, by_seed in runs.items()
        for seed, run in by_seed.items()
    )
    failed = "".join(f"\n`{cell}` did not come to its end: {why}\n" for cell, why in result.get("failed", {}).items())
    best = max(runs, key=lambda arm: mean(joint_exact(run, "unseen") for run in runs[arm].values()))
    return f"""
## Several levels at once

{circumstances_line(result)}
{max(notes, default="")}Each run used one thread, two at a time and beside
other work, so the seconds compare the policies only.

Held-out questions of the fold that the quickstart reports on, judged by the gold scorer, 4 completions per request at
temperature 1; means over seeds. Seen: combinations of two to four levels that training may ask for; unseen: those that
it never asks for. Spearman and exact are those of single requests. Cross-talk: mean absolute change of the other
dimensions per level of a single request, without verbosity and helpfulness, since right steps are sentences. Shift:
largest change of a level where nothing is asked for. The policies differ by the files in `configs/experiment/joint/`;
`default` is the quickstart's.

{table(header, rows)}
Where `{best.split("/")[-1]}` fails, means over its seeds:

{table(COUNT_HEADER, by_count(runs[best]))}
{table(DIMENSION_HEADER, by_dimension(runs[best]))}{failed}"""


def joint_exact(run: dict[str, Any], kind: str) -> float:
    """Share of completions that meet all requested levels."""
    return run["combinations"][kind]["joint_exact"]


def figures(runs: list[dict[str, Any]]) -> list[str]:
    """The figures of one policy, means over seeds."""
    values = [
        *([joint_exact(run, kind) for run in runs] for kind in ("seen", "unseen")),
        *([run["combinations"][kind]["mae"] for run in runs] for kind in ("seen", "unseen")),
        *([run["mean"][name] for run in runs] for name in ("spearman", "exact")),
        [cross_talk(run) for run in runs],
        [default_shift(run) for run in runs],
    ]
    return [*(f"{mean(of_seeds):.3f}" for of_seeds in values), f"{mean(run['seconds'] for run in runs):.0f}"]


def cross_talk(run: dict[str, Any]) -> float:
    """Mean absolute change of the dimensions that are not requested and not forced to move."""
    names = list(run["dimensions"])
    return mean(
        abs(slope)
        for requested, row in zip(names, run["cross_talk"], strict=True)
        for name, slope in zip(names, row, strict=True)
        if name != requested and {name, requested} != FORCED
    )


def by_count(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Share of exact answers by number of requested dimensions."""
    counts = sorted({count for run in runs.values() for count in run["joint"]["seen"]["by_count"]})
    return [
        [
            f"{count} dimensions",
            *(
                f"{mean(run['joint'][kind]['by_count'][count]['exact'] for run in runs.values()):.3f}"
                for kind in ("seen", "unseen")
            ),
        ]
        for count in counts
    ]


def by_dimension(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Share of exact levels by dimension."""
    rows = []
    for name in next(iter(runs.values()))["joint"]["seen"]["dimensions"]:
        joint = [run["joint"] for run in runs.values()]
        values = [
            *(mean(part[kind]["dimensions"][name]["exact"] for part in joint) for kind in ("seen", "unseen")),
            mean(part["seen"]["dimensions"][name]["single"] for part in joint),
            mean(part["seen"]["classifier"]["agreement"][name] for part in joint),
        ]
        rows.append([name, *(f"{value:.3f}" for value in values)])
    return rows
