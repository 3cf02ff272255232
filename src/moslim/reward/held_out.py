"""The validation rows as the classifier saw them, of all processes together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from moslim.data.sources.overlap import question_key
from moslim.data.types import Question


class HeldOut(Metric):
    """Collects what :func:`moslim.reward.calibration.calibrate` needs, from rows that have a label."""

    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]
    questions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "targets", "questions"):
            self.add_state(name, [], "cat")

    def update(self, logits: Tensor, targets: Tensor, questions: Sequence[Question]) -> None:
        """Takes a batch: logits at temperature 1 and targets, both ``[B, D, K]``, and the ``B`` questions."""
        labelled = (targets > 0).any(-1).any(-1)
        keys = torch.tensor([question_number(question) for question in questions], device=logits.device)
        self.logits.append(logits[labelled])
        self.targets.append(targets[labelled])
        self.questions.append(keys[labelled])

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and targets ``[N, D, K]``, and a hash ``[N]`` of each question. Every process must call it."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.targets), dim_zero_cat(self.questions)


def question_number(question: Question) -> int:
    """A number that stands for what :func:`question_key` calls one question: 64 bits, the same in every process."""
    digest = hashlib.sha256(question_key(question).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
