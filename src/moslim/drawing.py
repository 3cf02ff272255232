"""The look that all pictures of the project share, and the figures that several of them are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8F98", "#22262B"

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#B5BAC1",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 130,
}
"""For ``matplotlib.rc_context``."""


def grid(count: int, width: float, height: float, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Small multiples, each of a size in inches: up to three in a row, four as two by two."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.9), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel)
    return figure, panels


def headline(figure: Figure, text: str) -> None:
    """Puts a headline over the figure, on the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=13)


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    cmap: str,
    limits: tuple[float, float],
) -> AxesImage:
    """Draws a matrix with a text in every cell; texts on the diagonal are bold, on dark cells white.

    Args:
        axes: Where to draw.
        values: What the colours stand for; NaN stays blank.
        texts: What stands in the cells.
        rows: Names of the rows.
        columns: Names of the columns.
        cmap: Name of a colour map that is dark where values are far from 0.
        limits: Values at the ends of the colour map.
    """
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1])
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            colour = "white" if abs(values[i][j]) > 0.6 * limits[1] else INK
            weight = "bold" if i == j else "normal"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontweight=weight)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image
