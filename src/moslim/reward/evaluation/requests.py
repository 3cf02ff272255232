"""Proxy and gold: what the classifier says of a policy's answers, beside what their labels say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moslim.levels import requested_probability
from moslim.preferences import INACTIVE
from moslim.reporting import Result
from moslim.reward.evaluation.rows import ScoredRows
from moslim.reward.losses import MISSING
from moslim.statistics import bootstrap_interval


def proxy_and_gold(rows: ScoredRows, names: Sequence[str]) -> Result | None:
    """How far a policy's answers meet its requests, by the classifier and by the labels, on the same answers.

    Args:
        rows: ``N`` scored answers.
        names: The ``D`` dimensions.

    Returns:
        ``dimensions`` and their ``mean``, each with ``n_rows``; ``proxy``, the mean probability of the requested level;
        ``gold``, the share of labels that are this level; ``gap``, proxy minus gold, and its ``interval`` over
        questions. None where no labelled answer was asked for anything.
    """
    asked = rows.requested.masked_fill(rows.levels == MISSING, INACTIVE)
    counted = asked != INACTIVE
    if not counted.any():
        return None
    proxy, gold = requested_probability(rows.probs, asked), requested_probability(rows.targets, asked)
    questions, question = rows.question.unique(return_inverse=True)
    gaps = gold.new_zeros(len(questions), len(names)).index_add_(0, question, (proxy - gold).nan_to_num(0.0))
    counts = torch.zeros_like(gaps).index_add_(0, question, counted.to(gaps.dtype))

    def gap(weights: Tensor) -> Tensor:
        return (weights @ gaps) / (weights @ counts)

    intervals = bootstrap_interval(gap, len(questions)).T
    values = {"proxy": proxy.nanmean(0), "gold": gold.nanmean(0), "gap": (proxy - gold).nanmean(0)}
    return {
        "dimensions": {
            name: {
                "n_rows": counted[:, d].sum(),
                **{kind: value[d] for kind, value in values.items()},
                "interval": intervals[d],
            }
            for d, name in enumerate(names)
        },
        "mean": {
            "n_rows": counted.any(1).sum(),
            **{kind: value.nanmean() for kind, value in values.items()},
            "interval": bootstrap_interval(lambda weights: gap(weights).nanmean(1), len(questions)),
        },
    }
