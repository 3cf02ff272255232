"""What a test measures from: level probabilities beside labels, and score margins of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from moslim.data.pairs import known_levels
from moslim.data.types import PairBatch
from moslim.levels import expected_level
from moslim.preferences import PreferenceSet
from moslim.processes import gathered
from moslim.reward.held_out import question_number

_ROUNDING = 1e-5
"""Score margins up to this are ties: two places in a batch do not give the very same numbers for the same answer."""


class _Stacked:
    """Parts of equal first axis, on CPU: tensors or lists; a dataclass."""

    subsets: list[str | None]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Joins what several batches or processes gave."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]  # type: ignore[arg-type]
        return cls(*(torch.cat(c) if isinstance(c[0], Tensor) else [x for part in c for x in part] for c in columns))

    def of_subset(self, name: str) -> Self:
        """Keeps what belongs to a named part of the data."""
        return self.select(torch.tensor([subset == name for subset in self.subsets]))

    def select(self, rows: Tensor) -> Self:
        """Keeps the rows of a mask ``[N]`` bool."""
        kept = rows.nonzero()[:, 0]
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(v[kept] if isinstance(v, Tensor) else [v[i] for i in kept.tolist()] for v in values))


@dataclass
class ScoredRows(_Stacked):
    """``N`` scored answers; ``D`` dimensions of up to ``K`` levels.

    Args:
        probs: ``[N, D, K]`` float64, 0 on levels that a dimension lacks.
        raw: ``[N, D, K]`` float64, the same without the temperatures that calibrate the heads.
        levels: ``[N, D]`` int64, -1 = not labelled.
        targets: ``[N, D, K]`` float64, share of the raters that gave each level; all 0 where not labelled.
        requested: ``[N, D]`` int64, level that a policy was asked for when it gave the answer, -1 = none.
        question: ``[N]`` int64, equal for answers to the same question.
        length: ``[N]`` int64, characters of the answer.
        subsets: Named part of the data that each row belongs to.
    """

    probs: Tensor
    raw: Tensor
    levels: Tensor
    targets: Tensor
    requested: Tensor
    question: Tensor
    length: Tensor
    subsets: list[str | None]

    def __len__(self) -> int:
        return len(self.subsets)


@dataclass
class ScoredPairs(_Stacked):
    """``P`` comparisons of two answers to one question.

    Args:
        score_margins: ``[P, D]`` float64, expected level of the chosen completion less that of the rejected.
        comparison_mask: ``[P, D]`` bool, the dimensions that each comparison speaks about.
        question: ``[P]`` int64, equal for comparisons of the same question.
        subsets: Named part of the data that each comparison belongs to.
    """

    score_margins: Tensor
    comparison_mask: Tensor
    question: Tensor
    subsets: list[str | None]

    def __len__(self) -> int:
        return len(self.question)


class ScoreCollector:
    """Collects what a test sees, batch by batch.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        dimensions, width = len(preferences), max(preferences.sizes)
        number, level = torch.empty(0, dtype=torch.long), torch.empty(0, dimensions, dtype=torch.long)
        probs = torch.empty(0, dimensions, width, dtype=torch.float64)
        self._preferences = preferences
        self._no_rows = ScoredRows(probs, probs, level, probs, level, number, number, [])
        self._no_pairs = ScoredPairs(level.double(), level.bool(), number, [])
        self.clear()

    def clear(self) -> None:
        """Forgets what an interrupted test collected."""
        self._rows, self._pairs = [self._no_rows], [self._no_pairs]

    def add(self, batch: PairBatch, probs: Tensor, raw: Tensor) -> None:
        """Takes a batch and its probabilities ``[B, D, K]``, calibrated and not. Unlabelled answers count in pairs."""
        probs, raw, targets = (values.detach().double().cpu() for values in (probs, raw, batch.targets))
        question = torch.tensor([question_number(row.group or row.question) for row in batch.rows], dtype=torch.long)
        length = torch.tensor([len(row.answer or "") for row in batch.rows], dtype=torch.long)
        subsets = [row.subset for row in batch.rows]
        asked = [self._preferences.encode(known_levels(row.requested, self._preferences)) for row in batch.rows]
        requested = torch.stack(asked)
        rows = ScoredRows(probs, raw, batch.levels.cpu(), targets, requested, question, length, subsets)
        self._rows.append(rows.select(targets.any(-1).any(-1)))
        expected, chosen, rejected = expected_level(probs), batch.chosen.cpu(), batch.rejected.cpu()
        score_margins = expected[chosen] - expected[rejected]
        score_margins = score_margins.where(score_margins.abs() > _ROUNDING, 0.0)
        parts = [subsets[row] for row in chosen.tolist()]
        self._pairs.append(ScoredPairs(score_margins, batch.comparison_mask.cpu(), question[chosen], parts))

    def gathered(self) -> tuple[ScoredRows, ScoredPairs]:
        """The rows and pairs of all processes; every process must ask."""
        parts = gathered((ScoredRows.concat(self._rows), ScoredPairs.concat(self._pairs)))
        return ScoredRows.concat([rows for rows, _ in parts]), ScoredPairs.concat([pairs for _, pairs in parts])
