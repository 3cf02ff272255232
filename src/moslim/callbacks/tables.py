"""Answers as tables on the console. Model text is shown as it is: neither markup nor terminal codes work in it."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from moslim.callbacks.answers import Row


def render(rows: list[Row], title: str, figures: Sequence[str], width: int = 120) -> str:
    """Lays rows out as a table.

    Args:
        rows: Of :func:`moslim.callbacks.answers.answer_rows`; may have more figures.
        title: Stands above the table.
        figures: Keys of the numbers to show.
        width: Of the table, in characters.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, show_lines=True, title_justify="left")
    for column, ratio in (("requested", 3), ("question", 4), ("answer", 8)):
        table.add_column(column, ratio=ratio)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    for row in rows:
        requested = "\n".join(
            f"{name}: {level} ({_signed(row['rewards'][name])})" for name, level in row["requested"].items()
        )
        cells = (requested or "nothing", _short(row["question"], 160), _short(row["answer"], 400))
        table.add_row(*map(Text, cells), *(_signed(row[figure]) for figure in figures))
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=sys.stdout.isatty()).print(table)
    return text.getvalue().rstrip()


def _short(text: str, limit: int) -> str:
    """One line without control characters, cut at ``limit``."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
