"""Reports of a steerability result: Markdown page, console table, files in a folder and logged metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from moslim.evaluation import plotting
from moslim.evaluation.steerability import MEASURES
from moslim.utils.files import (
    Result,
    console_table,
    log_pictures,
    markdown_pictures,
    markdown_table,
    number,
    write_figures,
    write_texts,
)

TITLES = {
    "spearman": "Spearman",
    "exact": "exact",
    "within_one": "within one",
    "mae": "MAE",
    "monotonicity": "monotonicity",
    "dynamic_range": "range",
}
"""Column titles of the measures, in the order of the tables."""

PROXY_NOTE = (
    "> **Proxy.** The judge of these results is a learned classifier. It can be wrong, and a policy can exploit it: "
    "treat the results as estimates."
)


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """Formats the report as a Markdown page; ``pictures`` are names of files in its folder."""
    mark = " (proxy)" if result["judge"]["proxy"] else ""
    names = list(result["dimensions"])
    reward, default = result["reward"], result["default_quality"]
    reward_rows = [
        [name, *(number(values[key][phase]) for key in ("proxy", "gold") for phase in ("before", "after"))]
        for name, values in [*reward["dimensions"].items(), ("**mean**", reward)]
    ]
    combination_rows = [
        [kind, *(_with_base(result, kind, key) for key in ("joint_exact", "mae"))]
        for kind, joint_measures in result["combinations"].items()
        if joint_measures
    ]
    cross_talk_rows = [
        [f"**{name}**", *map(number, row)] for name, row in zip(names, result["cross_talk"], strict=True)
    ]
    default_rows = [
        [name, number(default["before"][name]), number(default["after"][name]), _default_change(default, name)]
        for name in names
    ]
    blocks = [
        f"# Steerability{mark}",
        f"{result['n_questions']} held-out questions, {result['n_answers']} answers, judge: "
        f"`{result['judge']['name']}`{mark}.",
        *([PROXY_NOTE] if mark else []),
        f"## Requested against achieved levels{mark}",
        "The trained policy, and in brackets the policy that it started from, on the same prompts.",
        markdown_table(["dimension", *TITLES.values()], _sweep_rows(result)),
        f"95% bootstrap interval of the mean, over questions: Spearman {_interval(result, 'spearman')}, "
        f"exact {_interval(result, 'exact')}.",
        *markdown_pictures(pictures),
        f"## Combinations of dimensions{mark}",
        markdown_table(["combinations", "all levels exact", "MAE"], combination_rows)
        if combination_rows
        else "No prompt requests several dimensions.",
        *(block for kind, joint in result["joint"].items() if joint for block in _joint_blocks(kind, joint, mark)),
        f"## Proxy and gold{mark}",
        "Proxy: mean probability of the requested level by the training classifier. Gold: share of requests that are "
        f"met according to the judge. Gap (proxy minus gold): {number(reward['gap']['before'])} before training, "
        f"{number(reward['gap']['after'])} after training.",
        markdown_table(["dimension", "proxy before", "proxy after", "gold before", "gold after"], reward_rows),
        f"## Levels without an instruction{mark}",
        "Mean achieved level.",
        markdown_table(["dimension", "before", "after", "change"], default_rows),
        f"## Cross-talk{mark}",
        "Change of the achieved level of a dimension (column) per level of the request (row). Interference, the mean "
        f"absolute change of other dimensions relative to the requested one: {number(result['interference'])}.",
        markdown_table(["requested dimension", *names], cross_talk_rows),
        "## Settings",
        f"```json\n{json.dumps(result['config'], indent=2, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def _joint_blocks(kind: str, joint: Result, mark: str) -> list[str]:
    """Sections of the page on the requests for several levels of one kind."""
    names = list(joint["dimensions"])
    keys = ["exact", "single", "exact_if_others_met", "mae"]
    classifier = joint["classifier"]
    rows = [
        [name, *(number(joint["dimensions"][name][key]) for key in keys), number(classifier["agreement"][name])]
        for name in names
    ]
    counts = [
        [count, number(part["exact"]), number(part["within_one"]), str(part["n_answers"])]
        for count, part in joint["by_count"].items()
    ]
    distances = [
        [number(part["distance"]), number(part["exact"]), str(part["n_answers"])] for part in joint["by_distance"]
    ]
    pairs = [[f"**{name}**", *map(number, row)] for name, row in zip(names, joint["pairs"], strict=True)]
    return [
        f"### Where {kind} combinations fail{mark}",
        markdown_table(["dimensions requested", "all levels exact", "all within one", "answers"], counts),
        "By dimension: share of exact levels; that of single requests for the same levels; that among answers that "
        "meet all other requested levels; and agreement of the training classifier with the judge.",
        markdown_table(["dimension", "exact", "single requests", "others met", "MAE", "classifier agrees"], rows),
        f"The classifier finds all levels met in {number(classifier['exact'])} of the answers, and in "
        f"{number(classifier['wrongly_met'])} of those where the judge finds one missed: errors of the classifier, "
        "the others are errors of the policy.",
        "Both levels met, by pair of requested dimensions:",
        markdown_table(["", *names], pairs),
        "By distance in levels from the answers to single requests, in three groups of equal size:",
        markdown_table(["distance", "all levels exact", "answers"], distances),
    ]


def summary_table(result: Result) -> str:
    """Formats the main results as a plain-text table for the console."""
    judge = result["judge"]["name"] + (" (proxy)" if result["judge"]["proxy"] else "")
    base = result["base"]
    after = {**result["dimensions"], "mean": result["mean"]}
    before = {**base["dimensions"], "mean": base["mean"]}
    table = console_table(
        f"Steerability, {result['n_questions']} questions, judge: {judge}",
        ["dimension", *TITLES.values()],
        {
            heading: [[name, *(number(values[measure]) for measure in TITLES)] for name, values in measured.items()]
            for heading, measured in (("", after), ("before training", before))
        },
    )
    gap = result["reward"]["gap"]["after"]
    gold = "share of requests met by the classifier judge" if result["judge"]["proxy"] else "gold"
    return f"{table}\nproxy minus {gold}: {number(gap)}\n"


def _sweep_rows(result: Result) -> list[list[str]]:
    base = result["base"]
    rows = [(name, values, base["dimensions"][name]) for name, values in result["dimensions"].items()]
    rows.append(("**mean**", result["mean"], base["mean"]))
    return [
        [name, *(f"{number(after[measure])} ({number(before[measure])})" for measure in TITLES)]
        for name, after, before in rows
    ]


def _with_base(result: Result, kind: str, key: str) -> str:
    base = result["base"]["combinations"][kind]
    return f"{number(result['combinations'][kind][key])} ({number(base[key] if base else None)})"


def _default_change(default: Mapping[str, Any], name: str) -> str:
    before, after = default["before"][name], default["after"][name]
    return number(None if before is None or after is None else after - before)


def _interval(result: Result, measure: str) -> str:
    lower, upper = result["interval"][measure]
    return f"{number(lower)} to {number(upper)}"


def write_report(
    result: Result, folder: str | Path, history: Sequence[plotting.Point] | Path | None = None
) -> dict[str, Path]:
    """Writes ``steerability.json``, ``report.md`` and the pictures, each file atomically; creates the folder.

    Args:
        result: Result of :func:`moslim.evaluation.steerability.steerability`.
        folder: Folder to write.
        history: Metrics logged in training, or the ``metrics.csv`` that has them, for the learning curves.

    Returns:
        Paths by ``json``, ``report``, ``requested_achieved``, ``cross_talk`` and, if the history has proxy or gold,
        ``learning_curves``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    points = plotting.read_history(history) if isinstance(history, Path) else history or []
    figures = {
        "requested_achieved": plotting.requested_against_achieved(result),
        "cross_talk": plotting.cross_talk(result),
        "learning_curves": plotting.learning_curves(points, list(result["dimensions"])),
    }
    pictures = write_figures(folder, figures)
    page = markdown(result, [path.name for path in pictures.values()])
    return write_texts(folder, "steerability", result, page) | pictures


def log_report(loggers: Iterable[Logger], paths: Mapping[str, Path], result: Result, step: int | None = None) -> None:
    """Logs the metrics to every logger, and the pictures to those that accept pictures; on rank 0 only.

    Args:
        loggers: ``trainer.loggers``.
        paths: Paths from :func:`write_report`.
        result: Result of the same report.
        step: Training step of the policy.
    """
    loggers = list(loggers)
    for logger in loggers:
        logger.log_metrics(scalars(result), step)
    log_pictures(loggers, paths, "steerability", step)


def scalars(result: Result) -> dict[str, float]:
    """Returns the metrics to log, under ``steerability/``, without undefined values."""
    metrics = {f"mean/{measure}": result["mean"][measure] for measure in MEASURES}
    for name, values in result["dimensions"].items():
        metrics |= {f"{name}/{measure}": values[measure] for measure in MEASURES}
    metrics |= {f"base/{measure}": result["base"]["mean"][measure] for measure in MEASURES}
    metrics |= {f"reward/{key}": result["reward"][key]["after"] for key in ("proxy", "gold", "gap")}
    for kind, joint_measures in result["combinations"].items():
        metrics |= {f"{kind}/{key}": joint_measures[key] for key in ("joint_exact", "mae")} if joint_measures else {}
    metrics["interference"] = result["interference"]
    return {f"steerability/{key}": value for key, value in metrics.items() if value is not None}
