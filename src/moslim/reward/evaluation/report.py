"""Writes a classifier's test into folders and names the figures that dashboards should chart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from moslim.reporting import Result, copy_report, log_pictures, write_figures, write_texts
from moslim.reward import metrics
from moslim.reward.evaluation import plots
from moslim.reward.evaluation.levels import MEASURES
from moslim.reward.evaluation.tables import markdown, summary_table

_PLACES = ("reward.json", "version_*/reward.json")


def publish(trainer: Trainer, result: Result, folders: Sequence[Path]) -> None:
    """Writes the report into folders, sends its pictures to the loggers and prints its table; for rank 0.

    Args:
        trainer: Whose loggers to use.
        result: What :func:`~moslim.reward.evaluation.result.evaluate` returned.
        folders: Where to write; the first one's pictures go to the loggers.
    """
    first, *copies = folders
    paths = write_report(result, first)
    log_pictures(trainer.loggers, paths, "test", trainer.global_step)
    for folder in copies:
        paths = copy_report(paths, folder)
    print(summary_table(result))
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))


def write_report(result: Result, folder: str | Path) -> dict[str, Path]:
    """Writes ``reward.json``, ``report.md`` and the pictures; each file is replaced whole or not at all.

    Returns:
        Path by name: ``json``, ``report``, ``confusion``, and ``correlation`` and ``reliability`` where there are such.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "confusion": plots.confusion_matrices(result),
        "correlation": plots.head_correlation(result),
        "reliability": plots.reliability(result["calibration"]),
    }
    pictures = write_figures(folder, figures)
    page = markdown(result, [path.name for path in pictures.values()])
    return write_texts(folder, "reward", result, page) | pictures


def find_result(folders: Iterable[str | Path], weights: str) -> Result | None:
    """Returns the newest test of these weights, or None.

    Args:
        folders: Roots of runs, or folders of reports.
        weights: Fingerprint of the weights.
    """
    files = {file for folder in folders for place in _PLACES for file in Path(folder).glob(place)}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("weights") == weights:
            return result
    return None


def scalars(result: Result) -> dict[str, float]:
    """The figures that dashboards should chart; what is not defined is left out.

    ``{dimension}/{measure}`` and ``mean/{measure}``; ``{subset}/...`` for the measures that validation has, too;
    ``calibration/{dimension}/{ece, classwise_ece, brier, rps}``; ``pairs/{dimension}/accuracy`` and
    ``pairs/weighted/accuracy``; ``requests/{dimension}/{proxy, gold, gap}`` and ``requests/mean/...``;
    ``best_of/accuracy``, ``best_of/paraphrased`` and ``best_of/every_paraphrase``.
    """
    values = _of(result, MEASURES)
    for name, part in result["subsets"].items():
        values |= {f"{name}/{key}": value for key, value in _of(part, metrics.MEASURES).items()}
    for name, figures in result["calibration"].items():
        kinds = ("ece", "classwise_ece", "brier", "rps")
        values |= {f"calibration/{name}/{kind}": figures[kind] for kind in kinds} if figures else {}
    if pairs := result["pairs"]:
        parts = {**pairs["dimensions"], "weighted": pairs["weighted"]}
        values |= {f"pairs/{name}/accuracy": part["accuracy"] for name, part in parts.items()}
    if asked := result["requests"]:
        parts = {**asked["dimensions"], "mean": asked["mean"]}
        shown = ("proxy", "gold", "gap")
        values |= {f"requests/{name}/{kind}": part[kind] for name, part in parts.items() for kind in shown}
    if found := result["best_of"]:
        values["best_of/accuracy"] = found["accuracy"]
        if again := found["paraphrases"]:
            values |= {"best_of/paraphrased": again["accuracy"], "best_of/every_paraphrase": again["every"]}
    return {key: value for key, value in values.items() if value is not None}


def _of(part: Result, measures: Sequence[str]) -> dict[str, float | None]:
    named = {**part["dimensions"], "mean": part["mean"]}
    return {f"{name}/{measure}": found[measure] for name, found in named.items() for measure in measures}
