"""Does a starter follow the loose style words in questions? Measured on the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moslim.data.sources.workbench import Workbench
from moslim.errors import UsageError
from moslim.supervised.module import SupervisedTrainer
from moslim.workbench.gold import gold_levels
from moslim.workbench.grammar import COARSE, QUESTIONS, Topic
from moslim.workbench.questions import ask

_PROBE = 7  # sets these answers apart from others with the same seed


class StyleProbe(Callback):
    """At the end of fit, measures how far each pair of style words moves its dimension's gold level.

    Logs ``style/{dimension}``: mean gold level with the high word less that with the low word, for a
    :class:`~moslim.callbacks.Gate` to compare. Held-out topics are not asked about. List it before the gate.

    Args:
        questions: Questions per style word.
    """

    def __init__(self, questions: int = 96) -> None:
        self.questions = questions

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Lightning.

        Raises:
            UsageError: The module is no SupervisedTrainer, or its data are not the embedded world's.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SupervisedTrainer):
            raise UsageError(f"StyleProbe measures a SupervisedTrainer, not a {type(pl_module).__name__}")
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        if not isinstance(source, Workbench):
            raise UsageError(f"StyleProbe asks about the embedded world, but data.source is a {type(source).__name__}")
        topics, found = source.topics(held_out=False), {}
        for number, (dimension, words) in enumerate(COARSE.items()):
            low, high = (self._mean_level(pl_module, topics, dimension, word, number) for word in words)
            found[f"style/{dimension}"] = high - low
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)

    def _mean_level(
        self, module: SupervisedTrainer, topics: Sequence[Topic], dimension: str, word: str, number: int
    ) -> float:
        asked = [topics[i * len(topics) // self.questions] for i in range(self.questions)]
        questions = [ask(topic, i % len(QUESTIONS), [word]) for i, topic in enumerate(asked)]
        keys: list[tuple[int, ...]] = [(_PROBE, number, i) for i in range(len(questions))]
        texts = module.answers(list(questions), keys, 1.0)
        return sum(gold_levels(q, a)[dimension] for q, a in zip(questions, texts, strict=True)) / len(texts)
