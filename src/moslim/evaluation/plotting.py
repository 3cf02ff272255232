"""Figures of steerability results and of classifier tests.

Functions that return a matplotlib ``Figure`` leave matplotlib's global state unchanged.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslim.utils.files import Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


# Blue and vermilion of Okabe and Ito's palette, which are distinct in colour-blind vision and in greyscale.
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
"""Options of ``matplotlib.rc_context``."""


def grid(count: int, width: float, height: float, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Creates a figure with a grid of panels, at most three per row; four are two by two.

    Args:
        count: Number of panels.
        width: Width of a panel in inches.
        height: Height of a panel in inches.
        ylabel: Label of the y-axes in the first column.
    """
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.9), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel)
    return figure, panels


def headline(figure: Figure, text: str) -> None:
    """Adds a left-aligned headline above the panels."""
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
    """Draws a matrix with a text in every cell: bold on the diagonal, white on dark cells.

    Args:
        axes: Axes to draw in.
        values: Values that give the colours; NaN stays blank.
        texts: Texts of the cells.
        rows: Names of the rows.
        columns: Names of the columns.
        cmap: Name of a colour map that is dark where values are far from 0.
        limits: Values at the ends of the colour map.
    """
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
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


Point = Mapping[str, float]
"""Logged values of one step by metric name, including ``step``."""


def requested_against_achieved(result: Mapping[str, Any]) -> Figure:
    """Plots achieved against requested levels of a sweep, with a panel per dimension.

    Dots show the share of answers at each level, and lines the mean level of the policy and of the starting policy.

    Args:
        result: Result of :func:`moslim.evaluation.steerability.steerability`.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        curves = result["curves"]
        figure, panels = grid(len(curves), width=4.0, height=3.7, ylabel="achieved")
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            _control_panel(axes, curve)
            caption = _caption(result["dimensions"][name])
            axes.set_title(name, pad=18)
            axes.text(0, 1.035, caption, transform=axes.transAxes, fontsize=9, color="#5B6169")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        headline(figure, f"Requested against achieved level, {_judged_by(result)}")
        return figure


def cross_talk(result: Mapping[str, Any]) -> Figure:
    """Plots the change of every dimension per requested level of each dimension as a heat map.

    Args:
        result: Result of :func:`moslim.evaluation.steerability.steerability`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names, matrix = list(result["dimensions"]), result["cross_talk"]
    with rc_context(STYLE):
        side = 1.9 + 0.85 * len(names)
        figure = Figure(figsize=(side + 1.1, side), layout="constrained")
        axes = figure.add_subplot()
        values = [_nan_for_none(row) for row in matrix]
        limit = max([1.15, *(abs(value) for row in values for value in row if not math.isnan(value))])
        texts = [[number(value, 2) for value in row] for row in matrix]
        image = heat_map(axes, values, texts, names, names, "RdBu", (-limit, limit))
        axes.set(xlabel="dimension of the achieved level", ylabel="dimension of the request")
        figure.colorbar(image, ax=axes, shrink=0.8, label="levels per requested level").outline.set_visible(False)
        headline(figure, f"Cross-talk, {_judged_by(result)}")
        return figure


def learning_curves(history: Sequence[Point], names: Sequence[str]) -> Figure | None:
    """Plots proxy and gold over training steps, for their means and for every dimension.

    Args:
        history: Logged metrics; those used are ``train/proxy``, ``train/gold``, and the same with ``/<dimension>``.
        names: The dimensions.

    Returns:
        The figure; None if the history has none of these metrics.
    """
    from matplotlib import rc_context

    suffixes = {"mean": "", **{name: f"/{name}" for name in names}}
    curves = {title: _proxy_and_gold(history, suffix) for title, suffix in suffixes.items()}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        return None
    with rc_context(STYLE):
        figure, panels = grid(len(curves), width=3.8, height=2.7, ylabel="requested level met")
        for axes, (title, lines) in zip(panels, curves.items(), strict=True):
            for label, colour, steps, values in lines:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
                axes.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
            axes.set(title=title, xlabel="training step", ylim=(0, 1))
            axes.grid(axis="y", color="#E4E7EB", linewidth=0.8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        headline(figure, "Proxy and gold during training")
        return figure


def read_history(metrics: Path) -> list[dict[str, float]]:
    """Reads Lightning's ``metrics.csv``: one dict per line, without empty cells."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def smooth(values: Sequence[float], share: float = 0.08) -> list[float]:
    """Centred moving mean over a window of a share of the points, which is truncated at both ends."""
    half = int(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _control_panel(axes: Axes, curve: Mapping[str, Any]) -> None:
    levels = range(len(curve["requested"]))
    dots = [(target, level, share) for target in levels for level, share in enumerate(curve["shares"][target]) if share]
    requested, achieved = [target for target, _, _ in dots], [level for _, level, _ in dots]
    areas = [420 * share for _, _, share in dots]
    before, after = _nan_for_none(curve["base"]), _nan_for_none(curve["policy"])
    axes.plot(levels, levels, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="ideal", zorder=1)
    axes.scatter(
        requested, achieved, s=areas, color=BLUE, alpha=0.25, linewidth=0, label="answers (area = share)", zorder=2
    )
    axes.plot(levels, before, color=GREY, linewidth=2, marker="s", markersize=4, label="before", zorder=3)
    axes.plot(levels, after, color=BLUE, linewidth=2.4, marker="o", markersize=5, label="trained", zorder=4)
    axes.set_xticks(levels, curve["requested"], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(levels, curve["requested"])
    margin = 0.5
    axes.set(xlim=(-margin, len(levels) - 1 + margin), ylim=(-margin, len(levels) - 1 + margin), aspect="equal")
    axes.set_xlabel("requested")
    axes.grid(color="#EEF0F2", linewidth=0.8)
    axes.set_axisbelow(True)


def _proxy_and_gold(history: Sequence[Point], suffix: str) -> list[tuple[str, str, list[float], list[float]]]:
    """Labels, colours, steps and values of the lines of one panel."""
    lines = []
    for name, colour, label in (("proxy", ORANGE, "proxy: classifier"), ("gold", BLUE, "gold: judge")):
        metric = f"train/{name}{suffix}"
        points = [point for point in history if math.isfinite(point.get(metric, math.nan))]
        if points:
            lines.append((label, colour, [point["step"] for point in points], [point[metric] for point in points]))
    return lines


def _nan_for_none(values: Sequence[float | None]) -> list[float]:
    """Replaces None, an undefined value, by NaN, which matplotlib leaves blank."""
    return [math.nan if value is None else value for value in values]


def _caption(measures: Mapping[str, float | None]) -> str:
    titles = {"spearman": "Spearman", "exact": "exact", "mae": "MAE"}
    return "   ".join(f"{title} {number(measures[key])}" for key, title in titles.items())


def _judged_by(result: Mapping[str, Any]) -> str:
    judge = result["judge"]
    return f"{judge['name']} judge" + (" (proxy)" if judge["proxy"] else "")


def confusion_matrices(result: Result) -> Figure:
    """Plots a confusion matrix per dimension: shares of the predicted levels, and counts, by labelled level.

    Args:
        result: Result of :func:`moslim.evaluation.classifier_report.evaluate`.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        dimensions = result["dimensions"]
        side = 1.9 + 0.62 * max(len(values["levels"]) for values in dimensions.values())
        figure, panels = grid(len(dimensions), width=side, height=side, ylabel="labelled")
        for axes, (name, values) in zip(panels, dimensions.items(), strict=True):
            counts, levels = values["confusion"], values["levels"]
            shares = [[count / sum(row) if sum(row) else math.nan for count in row] for row in counts]
            texts = [
                ["" if math.isnan(share) else f"{share:.2f}\n{count}" for share, count in zip(*rows, strict=True)]
                for rows in zip(shares, counts, strict=True)
            ]
            heat_map(axes, shares, texts, levels, levels, "Blues", (0.0, 1.0))
            axes.set_title(f"{name}   accuracy {number(values['accuracy'], 2)}")
            axes.set_xlabel("predicted")
        headline(figure, f"Labelled against predicted level, {result['n_rows']} answers")
        return figure


def head_correlation(result: Result) -> Figure | None:
    """Plots the correlation between the heads' expected levels, and between the labels, as two heat maps.

    Args:
        result: Result of :func:`moslim.evaluation.classifier_report.evaluate`.

    Returns:
        The figure; None with one dimension.
    """
    from matplotlib import rc_context

    correlation = result["correlation"]
    if correlation is None:
        return None
    with rc_context(STYLE):
        names = correlation["names"]
        side = 1.9 + 0.75 * len(names)
        figure, panels = grid(2, width=side, height=side, ylabel="")
        for axes, (key, title) in zip(panels, {"expected": "heads", "label": "labels"}.items(), strict=True):
            values = [_nan_for_none(row) for row in correlation[key]]
            texts = [[number(value, 2) for value in row] for row in correlation[key]]
            heat_map(axes, values, texts, names, names, "RdBu", (-1.0, 1.0))
            axes.set_title(title)
        headline(figure, "Spearman's correlation between dimensions")
        return figure


def reliability(calibration: Mapping[str, Mapping[str, Any] | None]) -> Figure | None:
    """Plots a reliability diagram per head: accuracy of the most probable level against its probability.

    Args:
        calibration: Result of :func:`moslim.evaluation.classifier_measures.head_calibration`.

    Returns:
        The figure; None if no dimension has labels.
    """
    from matplotlib import rc_context

    heads = {name: errors for name, errors in calibration.items() if errors is not None}
    if not heads:
        return None
    with rc_context(STYLE):
        figure, panels = grid(len(heads), width=3.6, height=3.4, ylabel="accuracy")
        for axes, (name, errors) in zip(panels, heads.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
            if errors["uncalibrated"] is not None:
                _plot_bins(axes, errors["uncalibrated"]["bins"], GREY, "without temperature")
            _plot_bins(axes, errors["bins"], BLUE, "classifier")
            axes.set(title=f"{name}   ECE {number(errors['ece'])}", xlabel="confidence", aspect="equal")
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            axes.grid(color="#EEF0F2", linewidth=0.8)
            axes.set_axisbelow(True)
        handles = {handle.get_label(): handle for axes in panels for handle in axes.get_legend_handles_labels()[0]}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=3)
        headline(figure, "Reliability of the most probable level (area = share of rows)")
        return figure


def _plot_bins(axes: Axes, bins: Mapping[str, Sequence[float]], colour: str, label: str) -> None:
    total = sum(bins["count"])
    areas = [12 + 300 * count / total for count in bins["count"]]
    axes.plot(bins["confidence"], bins["accuracy"], color=colour, linewidth=1.6, label=label)
    axes.scatter(bins["confidence"], bins["accuracy"], s=areas, color=colour, alpha=0.5, linewidth=0)
