"""Judged answers, stacked: everything that the measures of steerability are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moslim.errors import UsageError

KINDS = ("sweep", "default", "seen", "unseen")
"""Shipped kinds of requests: one dimension's level sweep, no instruction, combinations of levels. Others may follow."""


@dataclass
class Records:
    """``N`` judged answers; ``D`` dimensions, at most ``K`` levels.

    Args:
        question: ``[N]`` int64, which question.
        sample: ``[N]`` int64, which of the answers drawn for one prompt.
        kinds: ``N`` names of :class:`~moslim.data.requests.EvaluationKind`.
        targets: ``[N, D]`` int64, requested level, -1 = not mentioned in the prompt.
        achieved: ``[N, D]`` float, the judge's level; NaN where it cannot judge.
        probs: ``[N, D, K]`` float, the training classifier's class probabilities, 0 on padded classes.

    Raises:
        UsageError: The fields disagree in ``N`` or ``D``, or a kind has no name.
    """

    question: Tensor
    sample: Tensor
    kinds: list[str]
    targets: Tensor
    achieved: Tensor
    probs: Tensor

    def __post_init__(self) -> None:
        n, d = self.targets.shape
        shapes = {
            "question": (self.question.shape, (n,)),
            "sample": (self.sample.shape, (n,)),
            "kinds": ((len(self.kinds),), (n,)),
            "achieved": (self.achieved.shape, (n, d)),
            "probs": (self.probs.shape[:2], (n, d)),
        }
        for name, (actual, expected) in shapes.items():
            if tuple(actual) != expected:
                raise UsageError(f"records.{name} is {tuple(actual)}, but targets {(n, d)} ask for {expected}")
        if not all(self.kinds):
            raise UsageError("records.kinds has an empty name: give the kind of request that each answer is to")

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def concat(cls, parts: Sequence[Records]) -> Records:
        """Joins the records of several batches or ranks.

        Raises:
            UsageError: There are no parts.
        """
        if not parts:
            raise UsageError("no records to join: the test data loader gave no batch")
        return cls(
            question=torch.cat([p.question for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            kinds=[kind for p in parts for kind in p.kinds],
            targets=torch.cat([p.targets for p in parts]),
            achieved=torch.cat([p.achieved for p in parts]),
            probs=torch.cat([p.probs for p in parts]),
        )

    def select(self, rows: Tensor) -> Records:
        """Keeps some rows: a mask ``[N]`` (bool) or positions (int64)."""
        rows = torch.arange(len(self))[rows.cpu()]
        return Records(
            question=self.question[rows],
            sample=self.sample[rows],
            kinds=[self.kinds[i] for i in rows.tolist()],
            targets=self.targets[rows],
            achieved=self.achieved[rows],
            probs=self.probs[rows],
        )

    def of_kind(self, kind: str) -> Records:
        """Keeps the rows of one kind."""
        return self.select(torch.tensor([k == kind for k in self.kinds], dtype=torch.bool))

    def canonical(self) -> Records:
        """Returns the same answers on CPU in one order, whatever batches and ranks they came from.

        Rows are ordered by question, kind, targets and sample. An answer that is there twice, as when ranks
        are padded to equal length, counts once.
        """
        known = [*KINDS, *sorted(set(self.kinds) - set(KINDS))]
        kinds = torch.tensor([known.index(kind) for kind in self.kinds], dtype=torch.long)
        columns = (self.question[:, None].cpu(), kinds[:, None], self.targets.cpu(), self.sample[:, None].cpu())
        identity = torch.cat(columns, dim=1)
        values = self.achieved.cpu().nan_to_num(-1.0)
        # lexsort's last key is the first to count: the identity's columns decide, values only break ties.
        keys = [*values.T.flip(0).numpy(), *identity.T.flip(0).numpy()]
        order = torch.from_numpy(np.lexsort(keys))
        identity = identity[order]
        new = torch.ones(len(self), dtype=torch.bool)
        new[1:] = (identity[1:] != identity[:-1]).any(dim=1)
        return self._cpu().select(order[new])

    def _cpu(self) -> Records:
        return Records(
            question=self.question.cpu(),
            sample=self.sample.cpu(),
            kinds=self.kinds,
            targets=self.targets.cpu(),
            achieved=self.achieved.cpu(),
            probs=self.probs.cpu(),
        )
