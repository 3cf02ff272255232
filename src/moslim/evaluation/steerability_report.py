"""Reports of a steerability result: Markdown page, console table, files in a folder and logged figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from moslim.evaluation import plotting as plots
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
    "monotonicity": "monotone",
    "dynamic_range": "range",
}
"""Measures in the order in which people should read them."""

PROXY_NOTE = (
    "> **Proxy.** The judge of these results is itself a learned classifier. It can be wrong, and a policy can be "
    "good at pleasing it: read the figures as an indication, not as a measurement."
)


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """The report as a Markdown page; ``pictures`` are file names beside it."""
    mark = " (proxy)" if result["judge"]["proxy"] else ""
    names = list(result["dimensions"])
    reward, default = result["reward"], result["default_quality"]
    before_and_after = [
        [name, *(number(d[kind][time]) for kind in ("proxy", "gold") for time in ("before", "after"))]
        for name, d in [*reward["dimensions"].items(), ("**mean**", reward)]
    ]
    joint = [
        [kind, *(_pair(result, kind, key) for key in ("joint_exact", "mae"))]
        for kind, joint_measures in result["combinations"].items()
        if joint_measures
    ]
    talk = [[f"**{name}**", *map(number, row)] for name, row in zip(names, result["cross_talk"], strict=True)]
    drift = [
        [name, number(default["before"][name]), number(default["after"][name]), _drift(default, name)] for name in names
    ]
    blocks = [
        f"# Steerability{mark}",
        f"{result['n_questions']} held-out questions, {result['n_answers']} answers, judge: "
        f"`{result['judge']['name']}`{mark}.",
        *([PROXY_NOTE] if mark else []),
        f"## Requested against achieved levels{mark}",
        "The trained policy, and in brackets the policy it started from under the same instructions.",
        markdown_table(["dimension", *TITLES.values()], _control_rows(result, "**mean**")),
        f"95% interval of the mean over questions: Spearman {_interval(result, 'spearman')}, "
        f"exact {_interval(result, 'exact')}.",
        *markdown_pictures(pictures),
        f"## Several dimensions at once{mark}",
        markdown_table(["combinations", "all levels exact", "MAE"], joint)
        if joint
        else "No prompt asked for several dimensions at once.",
        f"## What was trained and what was wanted{mark}",
        "Proxy: the training classifier's probability of the requested level. Gold: share of requests that the "
        f"judge found met. Gap (proxy minus gold): {number(reward['gap']['before'])} before, "
        f"{number(reward['gap']['after'])} after.",
        markdown_table(["dimension", "proxy before", "proxy after", "gold before", "gold after"], before_and_after),
        f"## Levels without an instruction{mark}",
        markdown_table(["dimension", "before", "after", "change"], drift),
        f"## Cross-talk{mark}",
        "Change of the level in the column for each level by which the row's request moves. Interference (mean of "
        f"the other columns relative to the row's own): {number(result['interference'])}.",
        markdown_table(["request moved", *names], talk),
        "## Settings",
        f"```json\n{json.dumps(result['config'], indent=2, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


def summary_table(result: Result) -> str:
    """The main figures as a plain-text table for the console."""
    judge = result["judge"]["name"] + (" (proxy)" if result["judge"]["proxy"] else "")
    trained, base = {**result["dimensions"], "mean": result["mean"]}, result["base"]
    before = {**base["dimensions"], "mean": base["mean"]}
    table = console_table(
        f"Steerability, {result['n_questions']} questions, judge: {judge}",
        ["dimension", *TITLES.values()],
        {
            heading: [[name, *(number(values[measure]) for measure in TITLES)] for name, values in figures.items()]
            for heading, figures in (("", trained), ("before training", before))
        },
    )
    gap = result["reward"]["gap"]["after"]
    met = "what the judge, a classifier itself, finds met" if result["judge"]["proxy"] else "gold"
    return f"{table}\nproxy minus {met}: {number(gap)}\n"


def _control_rows(result: Result, mean: str) -> list[list[str]]:
    pairs = [(name, values, result["base"]["dimensions"][name]) for name, values in result["dimensions"].items()]
    pairs.append((mean, result["mean"], result["base"]["mean"]))
    return [[name, *(f"{number(a[m])} ({number(b[m])})" for m in TITLES)] for name, a, b in pairs]


def _pair(result: Result, kind: str, key: str) -> str:
    base = result["base"]["combinations"][kind]
    return f"{number(result['combinations'][kind][key])} ({number(base[key] if base else None)})"


def _drift(default: Mapping[str, Any], name: str) -> str:
    before, after = default["before"][name], default["after"][name]
    return number(None if before is None or after is None else after - before)


def _interval(result: Result, measure: str) -> str:
    low, high = result["interval"][measure]
    return f"{number(low)} to {number(high)}"


def write_report(
    result: Result, folder: str | Path, history: Sequence[plots.Point] | Path | None = None
) -> dict[str, Path]:
    """Writes ``steerability.json``, ``report.md`` and the pictures. Files are replaced whole or not at all.

    Args:
        result: What :func:`moslim.evaluation.steerability.steerability` returned.
        folder: Where to write; created where it does not exist.
        history: Points logged in training, or the ``metrics.csv`` that holds them, for the learning curves.

    Returns:
        Path by name: ``json``, ``report``, ``requested_achieved``, ``cross_talk``, and ``learning_curves`` where
        the history has them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    points = plots.read_history(history) if isinstance(history, Path) else history or []
    figures = {
        "requested_achieved": plots.requested_against_achieved(result),
        "cross_talk": plots.cross_talk(result),
        "learning_curves": plots.learning_curves(points, list(result["dimensions"])),
    }
    pictures = write_figures(folder, figures)
    page = markdown(result, [path.name for path in pictures.values()])
    return write_texts(folder, "steerability", result, page) | pictures


def log_report(loggers: Iterable[Logger], paths: Mapping[str, Path], result: Result, step: int | None = None) -> None:
    """Sends the figures to every logger, and the pictures to those that take pictures. Call it on rank 0.

    Args:
        loggers: ``trainer.loggers``.
        paths: What :func:`write_report` returned.
        result: The same result.
        step: Training step that the policy comes from.
    """
    loggers = list(loggers)
    for logger in loggers:
        logger.log_metrics(scalars(result), step)
    log_pictures(loggers, paths, "steerability", step)


def scalars(result: Result) -> dict[str, float]:
    """The figures that dashboards should chart, under ``steerability/``; what was not measured is left out."""
    values = {f"mean/{measure}": result["mean"][measure] for measure in MEASURES}
    values |= {f"{name}/{measure}": d[measure] for name, d in result["dimensions"].items() for measure in MEASURES}
    values |= {f"base/{measure}": result["base"]["mean"][measure] for measure in MEASURES}
    values |= {f"reward/{kind}": result["reward"][kind]["after"] for kind in ("proxy", "gold", "gap")}
    for kind, joint in result["combinations"].items():
        values |= {f"{kind}/{key}": joint[key] for key in ("joint_exact", "mae")} if joint else {}
    values["interference"] = result["interference"]
    return {f"steerability/{key}": value for key, value in values.items() if value is not None}
