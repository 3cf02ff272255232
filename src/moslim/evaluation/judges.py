"""Judges: measures of the levels that answers achieve, independent of the classifier that trained the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moslim.data.types import Question
from moslim.preferences import PreferenceSet

if TYPE_CHECKING:
    from moslim.reward.scorer import Scorer


@dataclass(frozen=True)
class JudgeInfo:
    """Description of a judge in results.

    Args:
        name: See :attr:`Judge.name`.
        proxy: See :attr:`Judge.proxy`.
    """

    name: str
    proxy: bool


class Judge(ABC):
    """Base class of judges. Subclass it, and name the subclass under ``model.judge``."""

    name: ClassVar[str]
    """Name of the judge in results; not a path, so that results do not depend on the location of files."""

    proxy: ClassVar[bool]
    """True for a learned model, which a policy can exploit; its results are marked as proxy."""

    preferences: PreferenceSet

    @property
    def info(self) -> JudgeInfo:
        """Description of the judge in results."""
        return JudgeInfo(self.name, self.proxy)

    def setup(self, preferences: PreferenceSet) -> None:
        """Sets the dimensions to judge, and loads models.

        Raises:
            ValueError: The judge lacks a dimension, or has other levels for it.
        """
        self.preferences = preferences

    @abstractmethod
    def levels(self, questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
        """Returns the achieved levels ``[N, D]`` (float32, CPU) of ``N`` answers; NaN where the judge cannot decide."""


class GoldJudge(Judge):
    """Computes the exact levels of answers in the embedded world."""

    name = "gold"
    proxy = False

    def setup(self, preferences: PreferenceSet) -> None:
        """See the base class; raises UsageError for dimensions that the embedded world lacks."""
        from moslim.workbench.grammar import LEVELS

        super().setup(preferences)
        preferences.columns_in(PreferenceSet(LEVELS), "gold judge of the embedded world")

    def levels(self, questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
        """See the base class."""
        from moslim.workbench.grammar import gold_levels

        names = self.preferences.names
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            levels = gold_levels(question, answer)
            rows.append([float(levels[name]) for name in names])
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(names))


class ClassifierJudge(Judge):
    """Returns the most probable levels of a second reward classifier.

    Args:
        path: Folder or Hub name of a saved reward classifier that did not train the policy, preferably with another
            backbone and trained on other rows.
        batch_size: Answers per forward pass.
        device: Device of the classifier.
        base: Base model of a classifier saved as an adapter; None = the location saved with it.
    """

    name = "classifier"
    proxy = True

    def __init__(self, path: str, batch_size: int = 256, device: str = "cpu", base: str | None = None) -> None:
        self.path = path
        self.batch_size = batch_size
        self.device = device
        self.base = base
        self._scorer: Scorer | None = None
        self._columns: list[int] = []

    def setup(self, preferences: PreferenceSet) -> None:
        """See the base class; loads the classifier."""
        from moslim.reward.scorer import Scorer

        super().setup(preferences)
        if self._scorer is None:
            self._scorer = Scorer(self.path, device=self.device, base=self.base)
        self._columns = preferences.columns_in(self._scorer.preferences, f"judge in {self.path}")

    def levels(self, questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
        """See the base class."""
        if self._scorer is None:
            raise RuntimeError("ClassifierJudge.levels was called before setup(preferences)")
        probs = self._scorer.probabilities(list(questions), list(answers), batch_size=self.batch_size)
        return probs[:, self._columns].argmax(dim=-1).float().cpu()
