"""The result of a test as one plain JSON document, ``reward.json``.

| key | holds |
|---|---|
| ``schema`` | version of this document; a key that is added does not change it |
| ``weights`` | added by the test stage: a fingerprint of the weights that were tested |
| ``dimensions`` | by dimension: ``levels`` (names), ``n_rows``, the measures, ``recall`` by level, ``confusion`` \
(rows = labelled), ``interval`` (95%, over questions) |
| ``mean`` | each measure's mean over the dimensions where it is defined |
| ``baseline`` | by dimension: always the most frequent label of these rows: ``level``, ``accuracy``, ``within_one`` |
| ``subsets`` | by subset: ``n_rows``, ``dimensions``, ``mean`` |
| ``length`` | :func:`~moslim.reward.evaluation.dependence.length_dependence` |
| ``correlation`` | :func:`~moslim.reward.evaluation.dependence.head_correlation`; null with one dimension |
| ``pairs`` | :func:`~moslim.reward.evaluation.pairs.pairwise`; null without compared answers |
| ``requests`` | :func:`~moslim.reward.evaluation.requests.proxy_and_gold`; null where no row was asked for |
| ``best_of`` | :class:`~moslim.reward.BestOf`; null without its file |
| ``calibration`` | by dimension: :func:`~moslim.reward.evaluation.reliability.calibration_of` |
| ``n_rows``, ``n_questions`` | labelled answers; questions that they, or compared answers, belong to |

The measures are ``accuracy``, ``balanced_accuracy``, ``within_one``, ``mae``, ``kappa`` (quadratic weights),
``macro_f1``, ``spearman`` (of the expected level) and ``auroc`` (two levels). What is not defined is null.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moslim.preferences import PreferenceSet
from moslim.reporting import Result, plain
from moslim.reward.evaluation.dependence import head_correlation, length_dependence
from moslim.reward.evaluation.levels import MEASURES, Labelled, level_intervals, level_measures, majority, recall
from moslim.reward.evaluation.pairs import pairwise
from moslim.reward.evaluation.reliability import calibration_of
from moslim.reward.evaluation.requests import proxy_and_gold
from moslim.reward.evaluation.rows import ScoredPairs, ScoredRows

SCHEMA = 1


def evaluate(
    rows: ScoredRows,
    pairs: ScoredPairs,
    preferences: PreferenceSet,
    pair_weights: Mapping[str, float] | None = None,
    best_of: Result | None = None,
) -> Result:
    """Measures a classifier.

    Args:
        rows: Its probabilities beside labels.
        pairs: Its expected levels of compared answers.
        preferences: The dimensions, in the order of the rows.
        pair_weights: See :func:`~moslim.reward.evaluation.pairs.pairwise`.
        best_of: What :class:`~moslim.reward.BestOf` found.

    Returns:
        Plain data that :mod:`json` writes as it is; see the module. It does not depend on the order of rows and pairs.
    """
    names = preferences.names
    heads = {d.name: Labelled.of(rows, i, len(d.levels)) for i, d in enumerate(preferences.dimensions)}
    matrices = {name: head.confusions().sum(0) for name, head in heads.items()}
    measured = _measured(rows, preferences)
    named = sorted({subset for subset in rows.subsets if subset})
    found = {
        "schema": SCHEMA,
        "dimensions": {
            name: {
                "levels": list(preferences[name].levels),
                **measured["dimensions"][name],
                "recall": recall(matrices[name]),
                "confusion": matrices[name].long(),
                "interval": level_intervals(head),
            }
            for name, head in heads.items()
        },
        "mean": measured["mean"],
        "baseline": {name: majority(head) for name, head in heads.items()},
        "subsets": {name: _measured(rows.of_subset(name), preferences) for name in named},
        "length": length_dependence(rows, names),
        "correlation": head_correlation(rows, names) if len(names) > 1 else None,
        "pairs": pairwise(pairs, preferences, pair_weights) if len(pairs) else None,
        "requests": proxy_and_gold(rows, names),
        "best_of": best_of,
        "calibration": calibration_of(rows, preferences),
        "n_rows": len(rows),
        "n_questions": len(torch.cat([rows.question, pairs.question]).unique()),
    }
    return plain(found)


def _measured(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    dimensions: dict[str, Result] = {}
    for i, dimension in enumerate(preferences.dimensions):
        head = Labelled.of(rows, i, len(dimension.levels))
        dimensions[dimension.name] = {"n_rows": len(head.levels), **level_measures(head)}
    mean = {m: torch.stack([found[m] for found in dimensions.values()]).nanmean() for m in MEASURES}
    return {"n_rows": len(rows), "dimensions": dimensions, "mean": mean}
