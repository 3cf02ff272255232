"""Does a starter follow the loose style words in questions? Measured on the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from moslim.supervised.module import SupervisedTrainer
from moslim.workbench.gold import gold_levels
from moslim.workbench.grammar import COARSE, QUESTIONS, TOPICS
from moslim.workbench.questions import ask

_PROBE = 7  # sets these answers apart from others with the same seed


class StyleProbe(Callback):
    """At the end of fit, measures how far each pair of style words moves its dimension's gold level.

    Logs ``style/{dimension}``: mean gold level with the high word less that with the low word, for a
    :class:`~moslim.callbacks.gate.Gate` to compare. List it before the gate.

    Args:
        questions: Questions per style word.
    """

    def __init__(self, questions: int = 96) -> None:
        self.questions = questions

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Lightning."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, SupervisedTrainer):
            raise TypeError(f"StyleProbe measures a SupervisedTrainer, not a {type(pl_module).__name__}")
        for number, (dimension, words) in enumerate(COARSE.items()):
            low, high = (self._mean_level(pl_module, dimension, (word,), number) for word in words)
            trainer.callback_metrics[f"style/{dimension}"] = pl_module.model.lm_head.weight.new_tensor(high - low)

    def _mean_level(self, module: SupervisedTrainer, dimension: str, words: Sequence[str], number: int) -> float:
        topics = [TOPICS[i * len(TOPICS) // self.questions] for i in range(self.questions)]
        questions = [ask(topic, i % len(QUESTIONS), words) for i, topic in enumerate(topics)]
        keys = [(_PROBE, number, i) for i in range(len(questions))]
        texts = module.answers(list(questions), keys, 1.0)
        return sum(gold_levels(q, a)[dimension] for q, a in zip(questions, texts, strict=True)) / len(texts)
