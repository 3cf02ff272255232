"""Writes a steerability result into a folder and sends it to the loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger

from moslim.evaluation import plots
from moslim.evaluation.steerability import MEASURES
from moslim.evaluation.tables import markdown
from moslim.reporting import Result, log_pictures, write_figures, write_texts


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
