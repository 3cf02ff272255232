"""Section on benchmarks/levels.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from common import Row, circumstances_line, table

Cell = dict[str, Any]

QUALITY = {"kappa": "kappa", "rps": "RPS", "within_one": "within one", "accuracy": "accuracy", "mae": "MAE"}
CALIBRATION = {"rps": "RPS", "ece": "ECE", "classwise_ece": "classwise ECE"}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    return f"""
## Classifiers on five levels

{circumstances_line(result)}
Kappa has quadratic weights; RPS is the ranked probability score, lower is better. Means over heads and seeds; after ±
the standard deviation over seeds.

Loss on the embedded world: {_rows(result["workbench"])}. Three raters label the training rows, with errors of a
standard deviation of one level; validation and test rows have exact levels. Best of four: share of prompts whose one
fitting answer gets the highest reward.

{_losses(result["workbench"])}
Loss and backbone on OpenAssistant: {_rows(result["openassistant"]["frozen"])}; MiniLM, heads quality and helpfulness:

{_trunks(result["openassistant"])}
Within-one accuracy on OpenAssistant, with its 95% interval over questions, beside the most frequent level of the test
rows (majority):

{_within_one(result["openassistant"])}
Calibration errors without → with temperatures, which are fitted on validation rows:

{_calibration(result)}
Training labels on the embedded world (cross-entropy): the raters' votes as soft targets, the level on which they
agree, or the exact level:

{_labels(result["labels"])}
Size of the embedded world's classifier (cross-entropy):

{_sizes(result["sizes"])}"""


def _rows(cells: dict[str, Cell]) -> str:
    rows = next(iter(cells.values()))["rows"]
    return f"{rows['train']} rows to train on, {rows['validation']} to calibrate with, {rows['test']} to test"


def _mean(cell: Cell, key: str) -> float:
    return mean(head[key] for head in cell["heads"].values())


def _quality(cell: Cell) -> Row:
    spread = cell["std"]
    return [f"{_mean(cell, key):.3f}" + (f" ± {spread[key]:.3f}" if key in spread else "") for key in QUALITY]


def _best_of(cell: Cell) -> Row:
    return [f"{value:.3f}" for value in cell["best_of"].values()]


def _losses(cells: dict[str, Cell]) -> str:
    rows = [[loss, *_quality(cell), *_best_of(cell)] for loss, cell in cells.items()]
    return table(["loss", *QUALITY.values(), "best of four", "paraphrased"], rows)


def _trunks(trunks: dict[str, dict[str, Cell]]) -> str:
    rows = [
        [backbone, loss, str(cell["seeds"]), *_quality(cell), f"{cell['seconds']:.0f}"]
        for backbone, cells in trunks.items()
        for loss, cell in cells.items()
    ]
    text = table(["backbone", "loss", "seeds", *QUALITY.values(), "seconds"], rows)
    if all(abs(_mean(cell, "kappa")) < 0.01 for cell in trunks["tuned"].values()):
        text += "\nTuned for two epochs on so few rows, MiniLM predicts little but the most frequent level.\n"
    return text


def _within_one(trunks: dict[str, dict[str, Cell]]) -> str:
    rows = []
    for backbone, cells in trunks.items():
        for loss, cell in cells.items():
            shown = [
                text
                for own in cell["heads"].values()
                for text in (
                    f"{own['within_one']:.3f} [{own['within_one_low']:.3f}, {own['within_one_high']:.3f}]",
                    f"{own['majority_within_one']:.3f}",
                )
            ]
            rows.append([backbone, loss, *shown])
    heads = next(iter(trunks["frozen"].values()))["heads"]
    return table(["backbone", "loss", *(title for name in heads for title in (name, "majority"))], rows)


def _calibration(result: dict[str, Any]) -> str:
    groups = {"embedded world": result["workbench"]}
    groups |= {f"OpenAssistant, {backbone}": cells for backbone, cells in result["openassistant"].items()}
    rows = [
        [name, loss, *(f"{_mean(cell, f'raw_{key}'):.3f} → {_mean(cell, key):.3f}" for key in CALIBRATION)]
        for name, cells in groups.items()
        for loss, cell in cells.items()
    ]
    return table(["data, backbone", "loss", *CALIBRATION.values()], rows)


def _labels(cells: dict[str, Cell]) -> str:
    rows = [[labels, *_quality(cell), *_best_of(cell)] for labels, cell in cells.items()]
    return table(["labels", *QUALITY.values(), "best of four", "paraphrased"], rows)


def _sizes(cells: dict[str, Cell]) -> str:
    rows = []
    for cell in cells.values():
        shape = [str(cell["width"]), str(cell["layers"]), f"{cell['parameters']:,}".replace(",", " ")]
        rows.append([*shape, *_quality(cell), *_best_of(cell), f"{cell['seconds']:.0f}"])
    return table(["width", "layers", "parameters", *QUALITY.values(), "best of four", "paraphrased", "seconds"], rows)
