"""What the heads' levels hang together with besides their labels: the length of the answer, and one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moslim.levels import expected_level
from moslim.reporting import Result
from moslim.reward.evaluation.rows import ScoredRows
from moslim.reward.losses import MISSING
from moslim.statistics import rank_correlation


def length_dependence(rows: ScoredRows, names: Sequence[str]) -> Result:
    """Accuracy by the length of the answer, and how levels follow length: heads' beside labels', on the same rows.

    A head whose expected level follows length more closely than its labels do rewards length for its own sake.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``unit``; ``buckets`` of the lengths' quartiles, empty ones left out, each with its shortest and longest answer
        (``from``, ``to``), ``n_rows`` and ``accuracy`` by dimension; ``spearman`` with length by dimension, of the
        ``expected`` level and of the ``label``.
    """
    length = rows.length.double()
    quartiles = length.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) if len(rows) else length
    bucket = torch.bucketize(length, quartiles)
    known = rows.levels != MISSING
    right = (rows.probs.argmax(-1) == rows.levels).double().where(known, torch.nan)
    expected = expected_level(rows.probs)
    return {
        "unit": "characters",
        "buckets": [
            {
                "from": int(length[bucket == b].min()),
                "to": int(length[bucket == b].max()),
                "n_rows": int((bucket == b).sum()),
                "accuracy": dict(zip(names, right[bucket == b].nanmean(0), strict=True)),
            }
            for b in bucket.unique().tolist()
        ],
        "spearman": {
            name: {
                "expected": rank_correlation(length[known[:, d]], expected[known[:, d], d]),
                "label": rank_correlation(length[known[:, d]], rows.levels[known[:, d], d].double()),
            }
            for d, name in enumerate(names)
        },
    }


def head_correlation(rows: ScoredRows, names: Sequence[str]) -> Result:
    """Spearman's correlation between every two heads' expected levels, beside that of their labels.

    Both are taken over the rows that are labelled on both dimensions. What the heads share beyond the labels is the
    classifier's own (a halo effect).

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``names``; ``expected`` and ``label``, ``[D, D]``; ``excess``, the mean over pairs of heads of
        ``|expected| - |label|``.
    """
    expected, labels = expected_level(rows.probs), rows.levels.double()
    known = rows.levels != MISSING

    def matrix(values: Tensor) -> Tensor:
        cells = [
            rank_correlation(values[known[:, i] & known[:, j], i], values[known[:, i] & known[:, j], j])
            for i in range(len(names))
            for j in range(len(names))
        ]
        return torch.stack(cells).reshape(len(names), len(names))

    found, wanted = matrix(expected), matrix(labels)
    different = ~torch.eye(len(names), dtype=torch.bool)
    excess = (found.abs() - wanted.abs())[different].nanmean()
    return {"names": list(names), "expected": found, "label": wanted, "excess": excess}
