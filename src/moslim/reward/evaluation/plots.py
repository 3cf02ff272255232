"""Pictures of a classifier's test. Each function returns a matplotlib ``Figure``; nothing global is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslim.drawing import BLUE, GREY, INK, STYLE, grid, headline, heat_map
from moslim.reporting import Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def confusion_matrices(result: Result) -> Figure:
    """One heat map per dimension: share of each labelled level's rows that were sorted into each level."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        dimensions = result["dimensions"]
        widest = max(len(d["levels"]) for d in dimensions.values())
        side = 1.9 + 0.62 * widest
        figure, panels = grid(len(dimensions), width=side, height=side, ylabel="labelled")
        for axes, (name, measured) in zip(panels, dimensions.items(), strict=True):
            counts, levels = measured["confusion"], measured["levels"]
            shares = [[count / sum(row) if sum(row) else math.nan for count in row] for row in counts]
            texts = [
                [f"{share:.2f}\n{count}" if sum(row) else "" for share, count in zip(line, row, strict=True)]
                for line, row in zip(shares, counts, strict=True)
            ]
            heat_map(axes, shares, texts, levels, levels, "Blues", (0.0, 1.0))
            axes.set_title(f"{name}   accuracy {number(measured['accuracy'], 2)}")
            axes.set_xlabel("predicted")
        headline(figure, f"Labelled against predicted level, {result['n_rows']} answers")
        return figure


def head_correlation(result: Result) -> Figure | None:
    """Two heat maps: how the heads' expected levels go together, and how the labels do; None with one dimension."""
    from matplotlib import rc_context

    correlation = result["correlation"]
    if correlation is None:
        return None
    with rc_context(STYLE):
        names = correlation["names"]
        side = 1.9 + 0.75 * len(names)
        figure, panels = grid(2, width=side, height=side, ylabel="")
        for axes, (kind, title) in zip(panels, {"expected": "heads", "label": "labels"}.items(), strict=True):
            matrix = correlation[kind]
            values = [[math.nan if value is None else value for value in row] for row in matrix]
            texts = [[number(value, 2) for value in row] for row in matrix]
            heat_map(axes, values, texts, names, names, "RdBu", (-1.0, 1.0))
            axes.set_title(title)
        headline(figure, "Spearman's correlation between dimensions")
        return figure


def reliability(calibration: Mapping[str, Mapping[str, Any] | None]) -> Figure | None:
    """One panel per head: how often predictions of a confidence are right; the diagonal is perfect.

    Args:
        calibration: By dimension: ``ece``, ``bins`` with the lists ``confidence``, ``accuracy`` and ``count``, and
            ``uncalibrated``, None or the same without temperatures; None for a dimension without labels.

    Returns:
        The figure; None where no dimension has labels.
    """
    from matplotlib import rc_context

    heads = {name: figures for name, figures in calibration.items() if figures is not None}
    if not heads:
        return None
    with rc_context(STYLE):
        figure, panels = grid(len(heads), width=3.6, height=3.4, ylabel="share that is right")
        for axes, (name, figures) in zip(panels, heads.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
            if figures["uncalibrated"] is not None:
                _bins(axes, figures["uncalibrated"]["bins"], GREY, "without temperature")
            _bins(axes, figures["bins"], BLUE, "classifier")
            axes.set(title=f"{name}   ECE {number(figures['ece'])}", xlabel="confidence", aspect="equal")
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            axes.grid(color="#EEF0F2", linewidth=0.8)
            axes.set_axisbelow(True)
        handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=3)
        headline(figure, "Reliability of the most probable level (area = share of rows)")
        return figure


def _bins(axes: Axes, bins: Mapping[str, Sequence[float]], colour: str, label: str) -> None:
    total = sum(bins["count"])
    areas = [12 + 300 * count / total for count in bins["count"]]
    axes.plot(bins["confidence"], bins["accuracy"], color=colour, linewidth=1.6, label=label)
    axes.scatter(bins["confidence"], bins["accuracy"], s=areas, color=colour, alpha=0.5, linewidth=0)
