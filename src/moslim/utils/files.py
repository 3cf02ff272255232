"""Files that appear whole: text, JSON, JSON Lines, Markdown and pictures.

Files that appear whole: they are written beside their place and renamed.

A file of records that is either whole or not there, and can be gone on with where its writer was interrupted.

What every report is made of: plain figures, Markdown tables, files that appear whole, pictures for dashboards.
"""

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
    """Gives a place beside ``path`` to write to; the file is renamed to ``path`` at the end.

    A reader or a crash never meets half a file. The place is the process's own, and is empty again after an error. The
    bytes are left to the operating system: after a power failure the file may be missing.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, see :func:`whole_file`."""
    with whole_file(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a file in UTF-8, see :func:`whole_file`."""
    write_bytes(path, content.encode())


class JsonLines:
    """Writes records to ``<name>.part``, batch by batch; :meth:`close` gives the file its name.

    Beside it lies ``<name>.part.json``, which says what the records depend on.

    Args:
        path: Where the file shall be.
        depends_on: What the records depend on, as plain data; see :func:`unfinished`.
        keep: Records of an interrupted writer to go on after; what it wrote behind them is lost.

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
            self._file.truncate(0)  # never old records beside a new note
            write_text(self._note, json.dumps(depends_on or {}, indent=1))
        for _ in range(keep):
            self._file.readline()
        self._file.truncate()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records, and leaves none of them in memory."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        self._file.flush()

    def stop(self) -> None:
        """Leaves what is written to be gone on with."""
        self._file.close()

    def close(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        os.replace(self._part, self.path)
        self._note.unlink()


def unfinished(path: Path, depends_on: dict[str, Any], quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the whole records that an interrupted writer left of a file.

    None, with a warning, if they depend on anything else, or the note of what they depend on is damaged.

    Args:
        path: The file's place when it is complete.
        depends_on: What its records depend on now, as given to :class:`JsonLines`.
        quiet: Whether to leave the warning out.
    """
    part, note = _beside(path)
    if not part.exists():
        return
    now = json.loads(json.dumps(depends_on))
    try:
        before = _record(note.read_bytes()) if note.exists() else {}
    except ValueError:
        _warn(f"{note}, which says what {part} depends on, is damaged: starting anew", quiet)
        return
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        _warn(f"{part} was written with another {' and '.join(changed)}: starting anew", quiet)
        return
    with part.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                record = _record(line)
            except ValueError:  # a machine that loses power can leave anything at the end of a file
                return
            yield record


def finished(path: Path, depends_on: dict[str, Any], rows: Iterable[Mapping[str, Any]], quiet: bool = False) -> int:
    """Returns how many rows at the start have a record in what an interrupted writer left.

    What it left is compared with the rows one by one: 0, with a warning, if they differ anywhere.

    Args:
        path: The file's place when it is complete.
        depends_on: What records depend on besides the rows.
        rows: What the record of each row must hold, from the first row.
        quiet: Whether to leave warnings out.
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
    """Moves what an interrupted writer left of a file, so that another place can be gone on with.

    Returns:
        False, and nothing is moved, if a process is still writing it.
    """
    part, note = _beside(path)
    with part.open("r+b") as file:
        if not _lock(file):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        for left, moved in zip((part, note), _beside(place), strict=True):
            os.replace(left, moved)
    return True


def _lock(file: IO[bytes]) -> bool:
    """Marks a file as being written until it is closed; False if another process has marked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
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
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


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
