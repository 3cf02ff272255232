"""How well the classifier's levels agree with the labels, per head and per named part of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from moslim.preferences import PreferenceSet
from moslim.processes import gathered
from moslim.reward.losses import MISSING

MEASURES = ("accuracy", "within_one", "mae", "kappa")


class LevelMetrics(Metric):
    """Accuracy, within-one accuracy, mean absolute error and quadratic weighted kappa of every head.

    All four are read off one confusion matrix per head, so an update costs one product and nothing is computed
    before the epoch ends.

    Args:
        preferences: The dimensions.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, preferences: PreferenceSet) -> None:
        super().__init__()
        self.preferences = preferences
        width = max(preferences.sizes)
        self.add_state("confusion", torch.zeros(len(preferences), width, width, dtype=torch.long), "sum")

    def update(self, predicted: Tensor, levels: Tensor) -> None:
        """Counts a batch: predicted and labelled levels, both ``[B, D]``; rows labelled -1 do not count."""
        width = self.confusion.shape[-1]
        labelled = (levels != MISSING)[..., None]
        truth = F.one_hot(levels.clamp(min=0), width) * labelled
        self.confusion += (truth[..., None] * F.one_hot(predicted, width)[..., None, :]).sum(0)  # exact: whole numbers

    def compute(self) -> dict[str, Tensor]:
        """``dimension/measure`` and ``mean/measure`` (over heads) to value; what is undefined is left out.

        A head without labels has no value; kappa has none either where chance agreement is complete.
        """
        rows = {name: measures(matrix) for name, matrix in zip(self.preferences.names, self.confusion, strict=True)}
        found = {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        found |= {f"mean/{key}": torch.stack([row[key] for row in rows.values()]).nanmean() for key in MEASURES}
        return {key: value.float() for key, value in found.items() if not value.isnan()}


def measures(confusion: Tensor) -> dict[str, Tensor]:
    """The four measures of one head, ``[...]`` float64; NaN where undefined.

    Args:
        confusion: ``[..., K, K]`` counts, rows = labelled level, columns = predicted.
    """
    confusion = confusion.cpu().double()
    total = confusion.sum((-2, -1))
    level = torch.arange(confusion.shape[-1])
    distance = (level[:, None] - level).abs()
    squared = distance.square()
    by_chance = confusion.sum(-1, keepdim=True) @ confusion.sum(-2, keepdim=True) / total[..., None, None]
    return {
        "accuracy": confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / total,
        "within_one": (confusion * (distance <= 1)).sum((-2, -1)) / total,
        "mae": (confusion * distance).sum((-2, -1)) / total,
        # Cohen 1968; 0/0, where labels and predictions are one single level, is NaN
        "kappa": 1 - (confusion * squared).sum((-2, -1)) / (by_chance * squared).sum((-2, -1)),
    }


class LossMean(Metric):
    """Means of the parts of a loss over all rows of an epoch and all processes, whatever the batches are.

    Args:
        parts: Number of parts ``L``.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(parts, dtype=torch.float32), "sum")
        self.add_state("counts", torch.zeros(parts, dtype=torch.float32), "sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Adds what a batch holds: the sum of each part and what it is to be divided by, ``[L]`` both."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> Tensor:
        """``[L]``; 0 where nothing was counted."""
        return self.sums / self.counts.where(self.counts > 0, 1.0)


class SubsetMetrics:
    """:class:`LevelMetrics` over all rows and over each named part of them.

    Args:
        preferences: The dimensions.
    """

    def __init__(self, preferences: PreferenceSet) -> None:
        self.preferences = preferences
        self._parts: dict[str, LevelMetrics] = {}

    def update(self, predicted: Tensor, levels: Tensor, subsets: Sequence[str | None]) -> None:
        """Counts a batch: levels ``[B, D]`` as in :meth:`LevelMetrics.update`, and the part each row belongs to."""
        self._part("", predicted.device).update(predicted, levels)
        for name in sorted({s for s in subsets if s}):
            rows = torch.tensor([s == name for s in subsets], device=predicted.device)
            self._part(name, predicted.device).update(predicted[rows], levels[rows])

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """``dimension/measure`` over all rows, ``subset/dimension/measure`` over parts.

        Every process must call it. A part may be unknown to some of them, so the names are exchanged first.
        """
        names: set[str] = set().union(*gathered(set(self._parts)))
        result: dict[str, Tensor] = {}
        for name in sorted(names):
            prefix = f"{name}/" if name else ""
            result |= {f"{prefix}{key}": value for key, value in self._part(name, device).compute().items()}
        return result

    def reset(self) -> None:
        """Forgets everything."""
        self._parts.clear()

    def _part(self, name: str, device: torch.device) -> LevelMetrics:
        if name not in self._parts:
            self._parts[name] = LevelMetrics(self.preferences).to(device)
        return self._parts[name]
