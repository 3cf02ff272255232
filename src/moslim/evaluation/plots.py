"""Pictures of a steerability result. Each function returns a matplotlib ``Figure``; nothing global is touched."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslim.drawing import BLUE, GREY, INK, ORANGE, STYLE, grid, headline, heat_map
from moslim.reporting import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, float]
"""What was logged at one step: column to value, with ``step`` among them."""


def requested_against_achieved(result: Mapping[str, Any]) -> Figure:
    """One panel per dimension: share of answers at each level (dots), their mean, the starting policy's mean."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        curves = result["curves"]
        figure, panels = grid(len(curves), width=4.0, height=3.7, ylabel="achieved")
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            _control_panel(axes, curve)
            measured = result["dimensions"][name]
            axes.set_title(name, pad=18)
            axes.text(0, 1.035, _caption(measured), transform=axes.transAxes, fontsize=9, color="#5B6169")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        headline(figure, f"Requested against achieved level, {_judged_by(result)}")
        return figure


def cross_talk(result: Mapping[str, Any]) -> Figure:
    """Heat map of how far every dimension moves when one of them is asked to move by a level."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names, matrix = list(result["dimensions"]), result["cross_talk"]
    with rc_context(STYLE):
        side = 1.9 + 0.85 * len(names)
        figure = Figure(figsize=(side + 1.1, side), layout="constrained")
        axes = figure.add_subplot()
        values = [[math.nan if x is None else x for x in row] for row in matrix]
        limit = max([1.15, *(abs(value) for row in values for value in row if not math.isnan(value))])
        texts = [[number(value, 2) for value in row] for row in matrix]
        image = heat_map(axes, values, texts, names, names, "RdBu", (-limit, limit))
        axes.set(xlabel="achieved level of", ylabel="request moved by one level")
        figure.colorbar(image, ax=axes, shrink=0.8, label="levels per requested level").outline.set_visible(False)
        headline(figure, f"Cross-talk, {_judged_by(result)}")
        return figure


def learning_curves(history: Sequence[Point], names: Sequence[str]) -> Figure | None:
    """Proxy and gold over training, for the mean and every dimension.

    Args:
        history: Logged points with the columns ``train/proxy``, ``train/gold``, and those with ``/<dimension>``.
        names: The dimensions.

    Returns:
        The figure; None where the history has no such column.
    """
    from matplotlib import rc_context

    panels_of = {"mean": "", **{name: f"/{name}" for name in names}}
    curves = {title: _proxy_and_gold(history, suffix) for title, suffix in panels_of.items()}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        return None
    with rc_context(STYLE):
        figure, panels = grid(len(curves), width=3.8, height=2.7, ylabel="target level reached")
        for axes, (title, lines) in zip(panels, curves.items(), strict=True):
            for label, colour, steps, values in lines:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
                axes.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
            axes.set(title=title, xlabel="training step", ylim=(0, 1))
            axes.grid(axis="y", color="#E4E7EB", linewidth=0.8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        headline(figure, "What training raises (proxy) and what is wanted (gold)")
        return figure


def read_history(metrics: Path) -> list[dict[str, float]]:
    """Reads Lightning's ``metrics.csv``; empty cells are left out."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def smooth(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Centred moving mean over a share of the points; at the ends the window is cut short."""
    half = int(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _control_panel(axes: Axes, curve: Mapping[str, Any]) -> None:
    levels = range(len(curve["requested"]))
    cells = [(t, a, share) for t in levels for a, share in enumerate(curve["shares"][t]) if share]
    areas = [420 * share for _, _, share in cells]
    axes.plot(levels, levels, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="ideal", zorder=1)
    axes.scatter(
        *_columns(cells), s=areas, color=BLUE, alpha=0.25, linewidth=0, label="answers (area = share)", zorder=2
    )
    axes.plot(levels, _gaps(curve["base"]), color=GREY, linewidth=2, marker="s", markersize=4, label="before", zorder=3)
    axes.plot(
        levels, _gaps(curve["policy"]), color=BLUE, linewidth=2.4, marker="o", markersize=5, label="trained", zorder=4
    )
    axes.set_xticks(levels, curve["requested"], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(levels, curve["requested"])
    margin = 0.5
    axes.set(xlim=(-margin, len(levels) - 1 + margin), ylim=(-margin, len(levels) - 1 + margin), aspect="equal")
    axes.set_xlabel("requested")
    axes.grid(color="#EEF0F2", linewidth=0.8)
    axes.set_axisbelow(True)


def _proxy_and_gold(history: Sequence[Point], suffix: str) -> list[tuple[str, str, list[float], list[float]]]:
    """Label, colour, steps and values of the lines of one panel."""
    lines = []
    for kind, colour, label in (("proxy", ORANGE, "proxy: classifier"), ("gold", BLUE, "gold: judge")):
        column = f"train/{kind}{suffix}"
        points = [point for point in history if math.isfinite(point.get(column, math.nan))]
        if points:
            lines.append((label, colour, [point["step"] for point in points], [point[column] for point in points]))
    return lines


def _columns(cells: list[tuple[int, int, float]]) -> tuple[list[int], list[int]]:
    return [t for t, _, _ in cells], [a for _, a, _ in cells]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _caption(measured: Mapping[str, float | None]) -> str:
    shown = {"Spearman": "spearman", "exact": "exact", "MAE": "mae"}
    return "   ".join(f"{label} {number(measured[key])}" for label, key in shown.items())


def _judged_by(result: Mapping[str, Any]) -> str:
    judge = result["judge"]
    return f"{judge['name']} judge" + (" (proxy)" if judge["proxy"] else "")
