"""Scores texts with a saved classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moslim.data.prompts import PairEncoder, pad, pad_id
from moslim.data.types import Question
from moslim.instructions import RESERVED
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import PreferenceClassifier


class Scorer:
    """A classifier with its tokenizer: question and answer in, level probabilities out.

    Args:
        classifier: The classifier; it is put into evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, classifier: PreferenceClassifier, tokenizer: PreTrainedTokenizerBase) -> None:
        self.classifier = classifier.eval()
        self.tokenizer = tokenizer
        self._encoder = PairEncoder(tokenizer, classifier.config.pair_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Scorer:
        """Loads a folder (or Hub name) that holds a classifier and its tokenizer.

        Raises:
            ValueError: A weight is missing.
        """
        classifier = PreferenceClassifier.from_pretrained(folder).to(device)
        return cls(classifier, AutoTokenizer.from_pretrained(folder))

    def reserve(self, delimiters: tuple[str, ...]) -> None:
        """Takes more strings out of questions and answers, which a policy could forge an instruction with."""
        self._encoder = PairEncoder(self.tokenizer, self.classifier.config.pair_length, (*RESERVED, *delimiters))

    @property
    def preferences(self) -> PreferenceSet:
        """The dimensions, in the order of the ``D`` axis."""
        return self.classifier.preferences

    def to(self, device: str | torch.device) -> Scorer:
        """Moves the classifier."""
        self.classifier.to(device)
        return self

    @torch.no_grad()
    def probabilities(
        self, questions: Sequence[Question], answers: Sequence[str], batch_size: int | None = None
    ) -> Tensor:
        """Probability of every level of every dimension.

        Pairs of like length are scored together, so that little padding is computed.

        Args:
            questions: ``N`` questions, without any instruction.
            answers: ``N`` answers.
            batch_size: Pairs per forward pass; None = 16 on a CPU, where small batches stay in the cache, else 256.

        Returns:
            ``[N, D, K]`` float32 on the classifier's device, in the order given; 0 on levels that a dimension lacks.
        """
        rows = [self._encoder.encode(q, a) for q, a in zip(questions, answers, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        sizes, device = self.preferences.sizes, self.classifier.device
        result = torch.zeros(len(rows), len(sizes), max(sizes), device=device)
        batch_size = batch_size or (16 if device.type == "cpu" else 256)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad([rows[i] for i in chosen], pad_id(self.tokenizer), left=False)
            result[chosen] = self.classifier.probabilities(ids.to(device), mask.to(device))
        return result
