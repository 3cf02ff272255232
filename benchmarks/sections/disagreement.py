"""Section on benchmarks/disagreement.py."""

from __future__ import annotations

from typing import Any

from common import Row, circumstances_line, table

FIGURES = {"accuracy": "accuracy", "auroc": "AUROC", "kappa": "kappa", "rps": "RPS", "best_of": "best of four"}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    rows = [
        _row(name, task["dimension"], arm, own)
        for name, task in result["tasks"].items()
        for arm, own in task["arms"].items()
    ]
    return f"""
## Comparisons, and margins where raters disagree

{circumstances_line(result)}
The share of comparisons won: of two answers to a question, the classifier prefers the one that raters rated higher.
Comparisons are made from rated rows; the margin is the difference of the mean votes. TruthfulQA and OpenAssistant train
heads on a frozen MiniLM; the embedded world trains a small encoder from random weights. Means over seeds, ± their
standard deviation; the interval is over questions, for the first seed. Best of four has chance 0.25; on TruthfulQA the
four answers have one combination of labels each, and each is requested in turn.

{table(["data", "compared", "learns from", "comparisons won [95%]", *FIGURES.values()], rows)}"""


def _row(name: str, dimension: str, arm: str, own: dict[str, Any]) -> Row:
    low, high = own["interval"]
    won = f"{own['pair_accuracy']:.3f} ± {own['pair_accuracy_std']:.3f} [{low:.3f}, {high:.3f}]"
    figures = (own[key] for key in FIGURES)
    return [name, dimension, arm, won, *("-" if value is None else f"{value:.3f}" for value in figures)]
