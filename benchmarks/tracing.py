"""What a training run computes, step by step, in a form that two runs can be compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

Step = dict[str, Any]


class Trace(Callback):
    """Writes a line after each training batch: its place, loss, and hashes of weights and rollout.

    Each process has a file of its own, ``{path}.{rank}``. A line is on disk before the next batch begins, so that a
    killed run leaves what it has done.

    Args:
        path: Where to write; a run that goes on adds to it.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollout = pl_module.rollout
        trained = (p for p in pl_module.parameters() if p.requires_grad)
        step = {
            "place": [trainer.current_epoch, batch_idx],
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "asked": digest([rollout.targets]),
            "tokens": digest([rollout.tokens]),
            "advantages": digest([rollout.advantages]),
            "weights": digest(trained),
        }
        with Path(f"{self.path}.{trainer.global_rank}").open("a", encoding="utf-8") as file:
            file.write(json.dumps(step) + "\n")


class Fail(Callback):
    """Raises an exception in the middle of a training batch, between rollout and gradient.

    Args:
        batch: How many are done before.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise RuntimeError(f"stopped on purpose after {self.batch} batches")


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash of every bit of some tensors."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def read(path: Path) -> list[Step]:
    """The finished lines of a trace; a kill may cut the last one short."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def same(one: Any, other: Any) -> bool:
    """Equality of what checkpoints are made of, bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and digest([one]) == digest([other])
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
