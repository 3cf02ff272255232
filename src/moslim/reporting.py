"""What every report is made of: plain figures, Markdown tables, files that appear whole, pictures for dashboards."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from moslim.accumulation import within_accumulation
from moslim.utils.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDEST = 10_000
"""Characters of a console wider than any table."""

Result = dict[str, Any]
"""A report's figures as plain data."""


def due(trainer: Trainer, steps: int = 1) -> bool:
    """Whether one of the next optimizer steps is among those that ``trainer.log_every_n_steps`` shows.

    What is logged in the others is lost, and computing and logging some thirty numbers costs a small model's step a few
    per cent.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set dynamically
    return bool(every) and (trainer.global_step + steps) // every > trainer.global_step // every


def shown(trainer: Trainer) -> bool:
    """Whether, at the end of a training batch, an optimizer step has just been made that is among those shown."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set dynamically
    return bool(every) and not within_accumulation(trainer) and trainer.global_step % every == 0


def plain(value: Any) -> Any:
    """Turns tensors into lists, NaN and infinities into None, and rounds floats to 6 digits, in any nesting."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # + 0.0: never "-0.0"
    return value


def number(value: float | None, digits: int = 3) -> str:
    """A figure as text; ``-`` for what could not be measured."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column stands left and whose others stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def console_table(title: str, header: Sequence[str], parts: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A plain-text table that is as wide as its content, so that no name is cut.

    Args:
        title: Line above the table.
        header: Titles of the columns; the first column is left-aligned, the others are right-aligned.
        parts: Rows by heading; an empty heading is not shown.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for heading, rows in parts.items():
        if heading:
            table.add_row(Text(heading))
        for row in rows:
            table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=_WIDEST, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    return "\n".join([title, *filter(None, lines)]) + "\n"


def metrics_table(title: str, metrics: Mapping[str, Tensor | float]) -> str:
    """A plain-text table of named figures with three decimals, in the order of the names."""
    rows = [[name, number(float(value))] for name, value in sorted(metrics.items())]
    return console_table(title, ["metric", "value"], {"": rows})


def markdown_pictures(names: Sequence[str]) -> list[str]:
    """Markdown that shows pictures, given the names of files beside the page."""
    return [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in names]


def png(figure: Figure) -> bytes:
    """A figure as a PNG file; the same figure always gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_figures(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
    """Draws ``<name>.png`` for every figure that there is; returns path by name. The folder must exist."""
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            write_bytes(paths[name], png(figure))
    return paths


def write_texts(folder: Path, name: str, result: Result, page: str) -> dict[str, Path]:
    """Writes the figures as ``<name>.json`` and the page as ``report.md``; returns their paths (``json``, ``report``).

    Raises:
        ValueError: The result holds NaN or an infinity; see :func:`plain`.
    """
    paths = {"json": folder / f"{name}.json", "report": folder / "report.md"}
    document = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(paths["json"], document)
    write_text(paths["report"], page)
    return paths


def copy_report(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Copies a written report, which is faster than drawing it again; returns path by name."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: folder / path.name for name, path in paths.items()}
    for name, copy in copies.items():
        write_bytes(copy, paths[name].read_bytes())
    return copies


def log_pictures(loggers: Iterable[Logger], paths: Mapping[str, Path], prefix: str, step: int | None) -> None:
    """Sends the PNG files among ``paths`` to the loggers that take pictures, as ``<prefix>/<name>``; for rank 0."""
    pictures = {f"{prefix}/{name}": path for name, path in paths.items() if path.suffix == ".png"}
    for logger in loggers:
        log_image = getattr(logger, "log_image", None)
        for name, path in pictures.items():
            if log_image is not None:
                log_image(key=name, images=[str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                from matplotlib.image import imread

                logger.experiment.add_image(name, imread(path)[:, :, :3], step, dataformats="HWC")
        logger.save()
