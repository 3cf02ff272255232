"""Rows whose measures can be computed by hand."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from moslim.evaluation.classifier_records import ScoredComparisons, ScoredRows
from tests.helpers.scored_rows import Rows
from tests.reward.conftest import backbone, preferences

__all__ = ["backbone", "preferences", "rows"]


@pytest.fixture
def rows() -> Rows:
    """Rows of the heads ``two`` and ``three`` that are 0.8 sure of what they predict."""

    def build(
        levels: Sequence[Sequence[int]],
        predicted: Sequence[Sequence[int]],
        question: Sequence[int] | None = None,
        length: Sequence[int] | None = None,
        subsets: Sequence[str | None] | None = None,
        requested: Sequence[Sequence[int]] | None = None,
    ) -> ScoredRows:
        count = len(levels)
        real = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        chosen = F.one_hot(torch.tensor(predicted), 3).double()
        others = (1 - chosen) * real
        probs = 0.8 * chosen + 0.2 * others / others.sum(-1, keepdim=True)
        known = torch.tensor(levels)
        return ScoredRows(
            probs,
            probs.clone(),
            known,
            F.one_hot(known.clamp(min=0), 3).double() * (known >= 0)[..., None],
            torch.tensor(requested) if requested is not None else torch.full_like(known, -1),
            torch.tensor(question if question is not None else range(count)),
            torch.tensor(length if length is not None else [1] * count),
            list(subsets) if subsets is not None else [None] * count,
        )

    return build


@pytest.fixture
def six(rows: Rows) -> ScoredRows:
    """Head ``two`` lacks a label, head ``three`` confuses [[1, 1, 0], [0, 2, 0], [1, 0, 1]]."""
    return rows(
        levels=[[0, 0], [0, 0], [1, 1], [1, 1], [-1, 2], [1, 2]],
        predicted=[[0, 0], [1, 1], [1, 1], [0, 1], [0, 2], [1, 0]],
        question=[7, 7, -3, -3, 5, 5],
        length=[1, 2, 3, 4, 5, 6],
        subsets=["en", "en", "en", "de", "de", None],
    )


@pytest.fixture
def no_comparisons() -> ScoredComparisons:
    return ScoredComparisons(torch.zeros(0, 2).double(), torch.zeros(0, 2).bool(), torch.zeros(0).long(), [])
