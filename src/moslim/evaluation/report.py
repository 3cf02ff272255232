"""Writes a steerability result into a folder and sends it to the loggers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger

from moslim.evaluation import plots
from moslim.evaluation.steerability import MEASURES, Result
from moslim.evaluation.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    pictures = {name: folder / f"{name}.png" for name, figure in figures.items() if figure is not None}
    for name, path in pictures.items():
        _replace(path, _png(figures[name]))
    document = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    paths = {"json": folder / "steerability.json", "report": folder / "report.md"}
    _replace(paths["json"], document.encode())
    _replace(paths["report"], markdown(result, [path.name for path in pictures.values()]).encode())
    return paths | pictures


def log_report(loggers: Iterable[Logger], paths: Mapping[str, Path], result: Result, step: int | None = None) -> None:
    """Sends the figures to every logger, and the pictures to those that take pictures. Call it on rank 0.

    Args:
        loggers: ``trainer.loggers``.
        paths: What :func:`write_report` returned.
        result: The same result.
        step: Training step that the policy comes from.
    """
    metrics = scalars(result)
    pictures = {name: path for name, path in paths.items() if path.suffix == ".png"}
    for logger in loggers:
        logger.log_metrics(metrics, step)
        log_image = getattr(logger, "log_image", None)
        if log_image is not None:
            for name, path in pictures.items():
                log_image(key=f"steerability/{name}", images=[str(path)], step=step)
        logger.save()


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


def _png(figure: Figure | None) -> bytes:
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Writes beside the target, then renames: a reader or a crash never meets half a file."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)
