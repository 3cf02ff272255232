"""Section on benchmarks/quickstart.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from cells import SCRAMBLED, quickstart_key
from common import circumstances_line, default_shift, met, outdated, table

Run = dict[str, Any]

GATES = {"samples": {"accuracy": 0.8, "within_one": 0.95}, "adversarial": {"accuracy": 0.6, "within_one": 0.85}}
MEASURES = ("exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range")
WANTED = {
    "whole quickstart, s": "<= 480",
    "policy stage (fit), s": "<= 300",
    "mean Spearman": ">= 0.88",
    "lowest Spearman of a dimension": ">= 0.75",
    "exact level": ">= 0.65",
    "within one": ">= 0.90",
    "MAE / MAE of the starting policy": "<= 0.333",
    "p_target minus gold exact rate": "<= 0.08",
    "largest shift of a default level": "<= 0.4",
    "starting policy's Spearman": "reported",
}


def figures(run: Run) -> dict[str, float]:
    """The figures of one quickstart that the first table compares with what was asked for."""
    seconds = run["seconds"]
    return {
        "whole quickstart, s": seconds["total"],
        "policy stage (fit), s": seconds["policy fit"],
        "mean Spearman": run["mean"]["spearman"],
        "lowest Spearman of a dimension": min(d["spearman"] for d in run["dimensions"].values()),
        "exact level": run["mean"]["exact"],
        "within one": run["mean"]["within_one"],
        "MAE / MAE of the starting policy": run["mean"]["mae"] / run["base"]["mean"]["mae"],
        "p_target minus gold exact rate": run["reward"]["gap"]["after"],
        "largest shift of a default level": default_shift(run),
        "starting policy's Spearman": run["base"]["mean"]["spearman"],
    }


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    runs = {key: value for key, value in result.items() if key.isdigit()}
    text = f"\n## Quickstart\n\n{circumstances_line(result)}\n{outdated(result['key'], quickstart_key(SCRAMBLED))}"
    for seed, failure in result.get("failed", {}).items():
        text += f"\nSeed {seed}: **{failure['stage']} failed**. {_heads(failure['classifier'])}\n"
    if not runs:
        return text
    config = next(iter(runs.values()))["config"]
    text += (
        f"Held-out questions, judged by the gold scorer, {config['eval_num_generations']} completions per request at "
        f"temperature {config['temperature']:g}.\n\n{_against_wanted(runs, result['scrambled'])}"
    )
    if "repeat" in result:
        outcome = "identical" if result["repeat"]["identical"] else "**different**"
        text += f"\nSeed {result['repeat']['seed']} run twice: `steerability.json` {outcome}.\n"
    text += f"\nBy dimension, mean over seeds:\n\n{_by_dimension(list(runs.values()))}"
    text += "\nRequests for two to four dimensions; training requested the seen combinations and no unseen one:"
    text += f"\n\n{_combinations(list(runs.values()))}"
    text += "\nThe reward classifier, on new completions of the starter (`samples`) and on the adversarial file:"
    text += f"\n\n{_gates(runs)}"
    return text + f"\nSeconds of each stage, including the start of Python:\n\n{_seconds(runs)}"


def _against_wanted(runs: dict[str, Run], controls: dict[str, Run]) -> str:
    columns = {seed: figures(run) for seed, run in runs.items()}
    rows = [[name, wanted, *(met(columns[s][name], wanted) for s in runs)] for name, wanted in WANTED.items()]
    scrambled = [met(abs(controls[s]["mean"]["spearman"]), "<= 0.15") if s in controls else "not run" for s in runs]
    rows.append(["scrambled control, mean Spearman, absolute", "<= 0.15", *scrambled])
    return table(["figure", "asked for", *_headings(runs)], rows)


def _by_dimension(runs: list[Run]) -> str:
    rows = []
    for name in runs[0]["dimensions"]:
        after = [f"{mean(run['dimensions'][name][m] for run in runs):.3f}" for m in MEASURES]
        before = [f"{mean(run['base']['dimensions'][name][m] for run in runs):.3f}" for m in ("spearman", "mae")]
        rows.append([name, *after, *before])
    return table(["dimension", *MEASURES, "Spearman before", "MAE before"], rows)


def _combinations(runs: list[Run]) -> str:
    rows = []
    for kind in ("seen", "unseen"):
        joint = [run["combinations"][kind] for run in runs]
        base = [run["base"]["combinations"][kind] for run in runs]
        values = (mean(x[m] for x in group) for m in ("joint_exact", "mae") for group in (joint, base))
        rows.append([kind, *(f"{value:.3f}" for value in values)])
    return table(["combinations", "joint exact", "before", "MAE per dimension", "before"], rows)


def _gates(runs: dict[str, Run]) -> str:
    rows = []
    for subset, bounds in GATES.items():
        for name in next(iter(runs.values()))["dimensions"]:
            for measure, least in bounds.items():
                reached = [met(run["classifier"][subset][name][measure], f">= {least}") for run in runs.values()]
                rows.append([f"{subset}, {name}, {measure}", f">= {least}", *reached])
    return table(["answers, head, measure", "asked for", *_headings(runs)], rows)


def _seconds(runs: dict[str, Run]) -> str:
    stages = next(iter(runs.values()))["seconds"]
    rows = [[stage, *(f"{run['seconds'][stage]:.0f}" for run in runs.values())] for stage in stages]
    return table(["stage", *_headings(runs)], rows)


def _headings(runs: dict[str, Run]) -> list[str]:
    return [f"seed {seed}" for seed in runs]


def _heads(classifier: Run) -> str:
    heads = [(s, d, m) for s, own in classifier.items() for d, m in own.items()]
    reached = "; ".join(f"{s} {d} {m['accuracy']:.3f}, {m['within_one']:.3f}" for s, d, m in heads)
    return f"Its classifier's accuracy, within one: {reached}." if reached else ""
