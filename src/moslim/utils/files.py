"""Atomic writes of files, resumable JSON Lines, and the parts of reports: tables, figures and logging of pictures."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moslim.training.optim import within_accumulation
from moslim.utils.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; the file written there is renamed to ``path`` at the end.

    So readers never see a partial file, also after a crash. The temporary path is unique to the process, and its file
    is deleted after an error. The data are not synced to disk: the file may be missing after a power failure.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a UTF-8 file atomically, see :func:`whole_file`."""
    write_bytes(path, content.encode())


class JsonLines:
    """Resumable writer of JSON Lines: writes to ``<name>.part``, which :meth:`close` renames to ``<name>``.

    ``<name>.part.json`` holds the inputs on which the records depend.

    Args:
        path: Path of the complete file.
        depends_on: Inputs of the records, as plain data; see :func:`unfinished`.
        keep: Number of records of an interrupted writer to keep; later ones are discarded.

    Raises:
        UsageError: Another process is writing the file.
    """

    def __init__(self, path: Path, depends_on: dict[str, Any] | None = None, keep: int = 0) -> None:
        self.path = path
        self._part, self._note = _beside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("r+b" if self._part.exists() else "w+b")
        if not _lock(self._file):
            raise UsageError(f"{self._part}: another process is writing it; wait for it, or name another file")
        if not keep:
            self._file.truncate(0)  # before the note, so that old records never have a new note
            write_text(self._note, json.dumps(depends_on or {}, indent=1))
        for _ in range(keep):
            self._file.readline()
        self._file.truncate()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records and flushes them."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()

    def stop(self) -> None:
        """Closes the partial file, so that another writer can resume it."""
        self._file.close()

    def close(self) -> None:
        """Closes the file and renames it to its final path."""
        self._file.close()
        os.replace(self._part, self.path)
        self._note.unlink()


def unfinished(path: Path, depends_on: dict[str, Any], quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the complete records of an interrupted writer.

    Yields nothing, with a warning, if their inputs differ or the note of their inputs is damaged.

    Args:
        path: Path of the complete file.
        depends_on: Inputs of the records, as given to :class:`JsonLines`.
        quiet: Whether to suppress the warning.
    """
    part, note = _beside(path)
    if not part.exists():
        return
    now = json.loads(json.dumps(depends_on))
    try:
        noted = _record(note.read_bytes()) if note.exists() else {}
    except ValueError:
        _warn(f"{note}, which says what {part} depends on, is damaged: starting anew", quiet)
        return
    changed = [key for key in now if noted.get(key) != now[key]]
    if changed:
        _warn(f"{part} was written with another {' and '.join(changed)}: starting anew", quiet)
        return
    with part.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = _record(line)
            except ValueError:  # the end of the file may be damaged after a power failure
                return
            yield record


def finished(path: Path, depends_on: dict[str, Any], rows: Iterable[Mapping[str, Any]], quiet: bool = False) -> int:
    """Returns the number of first rows that have a record of an interrupted writer.

    The records are compared with the rows; if any differs, the result is 0, with a warning.

    Args:
        path: Path of the complete file.
        depends_on: Inputs of the records besides the rows.
        rows: Fields that the record of each row must contain, in order.
        quiet: Whether to suppress warnings.
    """
    count = 0
    remaining = iter(rows)
    for record in unfinished(path, depends_on, quiet):
        row = next(remaining, None)
        if row is None or any(record.get(key) != value for key, value in row.items()):
            _warn(f"line {count + 1} of {path}.part is not row {count + 1} of the source: starting anew", quiet)
            return 0
        count += 1
    return count


def move_unfinished(path: Path, place: Path) -> bool:
    """Moves the partial file of an interrupted writer, to be resumed as the partial file of ``place``.

    Returns:
        Whether it was moved; False if a process is still writing it.
    """
    part, note = _beside(path)
    with part.open("r+b") as file:
        if not _lock(file):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        for source, target in zip((part, note), _beside(place), strict=True):
            os.replace(source, target)
    return True


def _lock(file: IO[bytes]) -> bool:
    """Locks a file until it is closed; False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def _warn(text: str, quiet: bool) -> None:
    if not quiet:
        rank_zero_warn(text)


def _record(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _beside(path: Path) -> tuple[Path, Path]:
    """Paths of the partial file and of the note of its inputs."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


_WIDEST = 10_000
"""Width of the console in characters, wider than any table."""

Result = dict[str, Any]
"""Results of a report as plain data."""


def due(trainer: Trainer, steps: int = 1) -> bool:
    """Whether ``trainer.log_every_n_steps`` selects one of the next ``steps`` optimizer steps for logging.

    The Trainer discards metrics of other steps, so computing them is a waste: about thirty metrics take a few per cent
    of a small model's step.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set dynamically
    return bool(every) and (trainer.global_step + steps) // every > trainer.global_step // every


def shown(trainer: Trainer) -> bool:
    """Whether a training batch ends with an optimizer step that ``trainer.log_every_n_steps`` selects for logging."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set dynamically
    return bool(every) and not within_accumulation(trainer) and trainer.global_step % every == 0


def plain(value: Any) -> Any:
    """Converts nested values to plain data: tensors to lists, NaN and infinities to None, floats to 6 decimals."""
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
    """Formats a number; None becomes ``-``."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table with the first column left-aligned and the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def console_table(title: str, header: Sequence[str], parts: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Formats a plain-text table that is as wide as its content, so that no name is cut.

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
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
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
    """Formats metrics as a plain-text table with three decimals, sorted by name."""
    rows = [[name, number(float(value))] for name, value in sorted(metrics.items())]
    return console_table(title, ["metric", "value"], {"": rows})


def markdown_pictures(names: Sequence[str]) -> list[str]:
    """Returns Markdown lines that show picture files in the folder of the page."""
    return [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in names]


def png(figure: Figure) -> bytes:
    """Renders a figure as a PNG file with reproducible bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_figures(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
    """Writes ``<name>.png`` for every figure that is not None; returns paths by name. The folder must exist."""
    paths = {}
    for name, figure in figures.items():
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            write_bytes(paths[name], png(figure))
    return paths


def write_texts(folder: Path, name: str, result: Result, page: str) -> dict[str, Path]:
    """Writes results as ``<name>.json`` and a page as ``report.md``.

    Returns:
        Paths by ``json`` and ``report``.

    Raises:
        ValueError: The results contain NaN or an infinity; see :func:`plain`.
    """
    paths = {"json": folder / f"{name}.json", "report": folder / "report.md"}
    document = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(paths["json"], document)
    write_text(paths["report"], page)
    return paths


def copy_report(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Copies the files of a report to a folder; returns the new paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: folder / path.name for name, path in paths.items()}
    for name, copy in copies.items():
        write_bytes(copy, paths[name].read_bytes())
    return copies


def log_pictures(loggers: Iterable[Logger], paths: Mapping[str, Path], prefix: str, step: int | None) -> None:
    """Logs the PNG files among ``paths`` as ``<prefix>/<name>`` to loggers that accept pictures; call it on rank 0."""
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
