"""Small hand-made records: two dimensions, two questions, one sample."""

from collections.abc import Callable

import pytest
import torch

from moslim.evaluation.steerability import Records
from moslim.preferences import PreferenceSet

Row = tuple[int, int, str, list[int], list[float]]  # question, sample, kind, targets, achieved
PROMPTS: list[tuple[int, str, list[int]]] = [
    *[(q, "sweep", [level, -1]) for q in (0, 1) for level in (0, 1, 2)],
    *[(q, "sweep", [-1, level]) for q in (0, 1) for level in (0, 1)],
    *[(q, "default", [-1, -1]) for q in (0, 1)],
    (0, "seen", [2, 1]),
    (1, "seen", [0, 1]),
]


@pytest.fixture
def preferences() -> PreferenceSet:
    return PreferenceSet({"warmth": ["cold", "neutral", "warm"], "length": ["short", "long"]})


@pytest.fixture
def make() -> Callable[[list[Row]], Records]:
    """The training classifier is 0.9 sure of the achieved level, and of level 0 where nothing was judged."""

    def build(rows: list[Row]) -> Records:
        achieved = torch.tensor([row[4] for row in rows], dtype=torch.float32).reshape(-1, 2)
        probs = torch.zeros(len(rows), 2, 3).scatter_(2, achieved.nan_to_num(0.0).long()[..., None], 0.9)
        return Records(
            question=torch.tensor([row[0] for row in rows], dtype=torch.long),
            sample=torch.tensor([row[1] for row in rows], dtype=torch.long),
            kinds=[row[2] for row in rows],
            targets=torch.tensor([row[3] for row in rows], dtype=torch.long).reshape(-1, 2),
            achieved=achieved,
            probs=probs,
        )

    return build


@pytest.fixture
def trained(make: Callable[[list[Row]], Records]) -> Records:
    """Warmth: question 0 meets every request, question 1 stays at 1. Length: question 0 meets, 1 reverses."""
    warmth = [[0, 0], [1, 0], [2, 1], [1, 1], [1, 1], [1, 1]]
    length = [[1, 0], [1, 1], [2, 1], [1, 0]]
    rest = [[1, 0], [2, 1], [2, 1], [2, 1]]
    achieved = [*warmth, *length, *rest]
    return make([(q, 0, kind, t, a) for (q, kind, t), a in zip(PROMPTS, achieved, strict=True)])


@pytest.fixture
def starting(trained: Records) -> Records:
    """The same prompts, always answered by warmth 1 and length 0."""
    n = len(trained)
    return Records(
        question=trained.question,
        sample=trained.sample,
        kinds=trained.kinds,
        targets=trained.targets,
        achieved=torch.tensor([1.0, 0.0]).repeat(n, 1),
        probs=torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]]).repeat(n, 1, 1),
    )
