"""Who samples the training answers, and when: on the spot, or one batch ahead while the policy learns from the last."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from moslim.data.types import PromptBatch
from moslim.policy.answering import Answerer, Answers, Purpose
from moslim.policy.engines import Completions

Key = tuple[int, int]
"""Which training batch answers are for: epoch, and batch number not counting repeats."""


@dataclass
class Sampled:
    """Answers to a training batch.

    Args:
        answers: The answers.
        version: Optimizer steps that their policy had made.
    """

    answers: Answers
    version: int

    def state(self) -> dict[str, Any]:
        """Plain data and tensors on CPU, for a checkpoint that loads with ``weights_only``."""
        found, own = vars(self.answers.completions), vars(self.answers)
        tensors = {**found, "input_ids": own["input_ids"], "attention_mask": own["attention_mask"]}
        return {
            "version": self.version,
            "questions": self.answers.questions,
            "texts": self.answers.texts,
            "tensors": {name: None if value is None else value.cpu() for name, value in tensors.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Sampled:
        """Inverse of :meth:`state`."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in state["tensors"].items()
        }
        ids, mask = moved.pop("input_ids"), moved.pop("attention_mask")
        answers = Answers(Completions(**moved), ids, mask, state["questions"], state["texts"])
        return cls(answers, state["version"])


class TrainingAnswers:
    """Samples the answers to training batches.

    What is sampled ahead comes from a copy of the policy, since the policy itself changes meanwhile. Noise is a
    function of the batch, and checkpoints hold what was sampled ahead, so that a resumed run equals the uninterrupted.

    Args:
        answerer: Samples and decodes.
        samples: Answers per prompt.
        seed: Seed of the noise.
        overlap: Whether to sample ahead.
    """

    def __init__(self, answerer: Answerer, samples: int, seed: int, overlap: bool) -> None:
        self._answerer, self._samples, self._seed = answerer, samples, seed
        self._pool = ThreadPoolExecutor(1) if overlap else None
        self._kept: dict[Key, Future[Sampled]] = {}
        self._copy: Any = None

    def take(self, policy: Any, batch: PromptBatch, key: Key, version: int) -> Sampled:
        """The answers to a batch; those to the batch after it are begun.

        Args:
            policy: The policy as it is now.
            batch: The prompts, which know those that follow.
            key: Their place in training.
            version: Optimizer steps that the policy has made.
        """
        own = self._kept.get(key)
        if own is None:
            self.wait()  # the engine may still be busy with what an epoch that was cut short did not take
            found = self._sampled(policy, batch, key, version)
        else:
            found = own.result()
        if self._pool is None:
            return found
        following = (key[0], key[1] + 1)
        # A step that fails is done again when the run goes on, and must then find what it found before.
        self._kept = {at: self._kept[at] for at in (key, following) if at in self._kept}
        if batch.following is not None and following not in self._kept:
            how = _autocast(batch.input_ids.device)
            self._kept[following] = self._pool.submit(
                self._sampled, self._copied(policy), batch.following, following, version, how
            )
        return found

    def wait(self) -> None:
        """Until nothing is being sampled, so that the engine is free for others."""
        for future in self._kept.values():
            future.exception()

    def forget(self) -> None:
        """Drops what was sampled for an earlier run."""
        self.wait()
        self._kept = {}

    def state(self) -> list[tuple[list[int], dict[str, Any]]]:
        """What has been sampled and may still be learnt from, when it is there; for a checkpoint.

        What failed is left out: it is sampled when it is wanted.
        """
        self.wait()
        done = {key: future for key, future in self._kept.items() if future.exception() is None}
        return [(list(key), future.result().state()) for key, future in done.items()]

    def load(self, state: list[tuple[list[int], dict[str, Any]]], device: torch.device) -> None:
        """Inverse of :meth:`state`."""
        self._kept = {}
        for (epoch, number), sampled in state:
            self._kept[epoch, number] = Future()
            self._kept[epoch, number].set_result(Sampled.from_state(sampled, device))

    def _sampled(
        self, model: Any, batch: PromptBatch, key: Key, version: int, how: dict[str, Any] | None = None
    ) -> Sampled:
        keys = [(self._seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
        with torch.autocast(**how) if how else nullcontext():
            return Sampled(self._answerer(model, batch, keys, self._samples, finite=False), version)

    def _copied(self, policy: Any) -> Any:
        """The policy at this moment; what is never trained is not copied."""
        if self._copy is None:
            frozen: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self._copy = deepcopy(policy, frozen).requires_grad_(False)
            for parameter in self._copy.parameters():
                parameter.grad = None
        with torch.no_grad():
            for mine, theirs in zip(self._copy.parameters(), policy.parameters(), strict=True):
                if mine is not theirs:
                    mine.copy_(theirs)
        return self._copy


def _autocast(device: torch.device) -> dict[str, Any]:
    """How mixed precision is set in this thread, for another one, which does not inherit it."""
    kind = device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }
