"""Takes a step again up to its loss, and shows what became of each answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moslim.callbacks.answers import Row, answer_rows
from moslim.checkpoint_files import GUARD_RECORD
from moslim.policy.kl import k1
from moslim.policy.module import PolicyTrainer


@dataclass
class Replayed:
    """A step as it was taken again.

    Args:
        loss: Its loss.
        logprobs: ``[N, T]`` of its answers under the weights of the checkpoint.
        rows: One record per answer.
        record: What the guard that wrote the checkpoint noted: ``guard``, ``reason``, ``process``, ``loss`` (that
            process's part of it), ``logprobs``; None in an ordinary checkpoint.
    """

    loss: float
    logprobs: Tensor
    rows: list[Row]
    record: dict[str, Any] | None


class StepTaken(Exception):
    """Ends the run of a :class:`Replay` before the weights change."""


class Replay(Callback):
    """Lets ``fit`` resume and stops it at the first backward pass, with the step's numbers in ``found``."""

    sees_nonfinite = True
    """A step is shown also where its numbers are not finite."""

    def __init__(self) -> None:
        self.found: Replayed | None = None
        self._record: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads what the guard noted."""
        self._record = checkpoint.get(GUARD_RECORD)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the numbers.

        Raises:
            StepTaken: Always.
        """
        assert isinstance(pl_module, PolicyTrainer)
        assert pl_module.rows is not None and pl_module.logprobs is not None and pl_module.step_loss is not None
        self.found = Replayed(
            loss=float(pl_module.step_loss),
            logprobs=pl_module.logprobs.cpu(),
            rows=_rows(pl_module, trainer.global_step),
            record=self._record,
        )
        raise StepTaken


def _rows(module: PolicyTrainer, step: int) -> list[Row]:
    """The answers with ``tokens``, ``ended``, ``log_ratio`` (sum over tokens) and ``kl`` (nats; None without)."""
    part, now = module.rows, module.logprobs
    assert part is not None and now is not None
    log_ratio = ((now - part.old_logprobs) * part.mask).sum(dim=1)
    kl = torch.full_like(log_ratio, torch.nan)
    if part.reference_logprobs is not None:
        kl = (k1(part.old_logprobs, part.reference_logprobs) * part.mask).sum(dim=1)
    figures = zip(part.mask.sum(dim=1).tolist(), part.ended.tolist(), log_ratio.tolist(), kl.tolist(), strict=True)
    return [
        {**row, "tokens": tokens, "ended": ended, "log_ratio": ratio, "kl": divergence}
        for row, (tokens, ended, ratio, divergence) in zip(
            answer_rows(part, module.preferences, step, len(part)), figures, strict=True
        )
    ]
