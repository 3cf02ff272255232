"""Collects judged answers over an evaluation, and makes the steerability report of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moslim.data.types import PromptBatch
from moslim.evaluation.judges import Judge, JudgeInfo
from moslim.evaluation.records import Records
from moslim.evaluation.report import log_report, write_report
from moslim.evaluation.tables import summary_table
from moslim.policy.answering import Answers
from moslim.processes import gathered
from moslim.reporting import Result, copy_report

TRAINING_CLASSIFIER = JudgeInfo("training classifier", proxy=True)
"""The judge of last resort: the classifier that gave the rewards."""


class Sweep:
    """The records of one evaluation, by who answered (``policy``, ``base``)."""

    def __init__(self) -> None:
        self._records: dict[str, list[Records]] = {}

    def clear(self) -> None:
        """Forgets what an interrupted evaluation collected."""
        self._records.clear()

    def add(self, who: str, batch: PromptBatch, answers: Answers, probs: Tensor, judge: Judge | None) -> None:
        """Judges the answers to a batch and keeps the outcome.

        Args:
            who: Who answered.
            batch: ``B`` prompts.
            answers: ``N = B * n`` answers.
            probs: ``[N, D, K]`` level probabilities of the training classifier.
            judge: Who measures achieved levels; None takes the classifier's most probable ones.
        """
        samples = len(answers.texts) // len(batch.questions)
        achieved = probs.argmax(dim=-1).float() if judge is None else judge.levels(answers.questions, answers.texts)
        self._records.setdefault(who, []).append(
            Records(
                question=batch.index.repeat_interleave(samples).cpu(),
                sample=torch.arange(samples).repeat(len(batch.questions)),
                kinds=[kind for kind in batch.kinds for _ in range(samples)],
                targets=batch.targets.repeat_interleave(samples, dim=0).cpu(),
                achieved=achieved.cpu(),
                probs=probs.cpu(),
            )
        )

    def gathered(self, who: str) -> Records:
        """The records of all processes in canonical order; every process must ask."""
        parts = [part for own in gathered(self._records.pop(who, [])) for part in own]
        return Records.concat(parts).canonical()


def publish(trainer: Trainer, result: Result, folders: Sequence[Path]) -> None:
    """Writes the report into folders, sends it to the loggers and prints its table; for rank 0.

    Args:
        trainer: Its checkpoint says where the training's metrics lie, for the learning curves.
        result: The steerability result.
        folders: Where to write; the first one's pictures go to the loggers.
    """
    checkpoint = trainer.ckpt_path
    metrics = Path(checkpoint).parent.parent / "metrics.csv" if checkpoint else None
    history = metrics if metrics is not None and metrics.exists() else None
    first, *copies = folders
    paths = write_report(result, first, history)
    log_report(trainer.loggers, paths, result, trainer.global_step)
    for folder in copies:
        paths = copy_report(paths, folder)
    print(summary_table(result))
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))
