"""Scores texts with a saved classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moslim.data.neutralise import Pattern, TakenOut
from moslim.data.prompts import PairEncoder, pad, pad_id
from moslim.data.types import Question
from moslim.limits import Positions, fit_tokenizer
from moslim.models import load_tokenizer
from moslim.packing import SharePrefixes, like_length, pass_tokens, worthwhile
from moslim.precision import at_least_float32
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import PreferenceClassifier
from moslim.reward.prefix import can_share, shared_features
from moslim.reward.sharing import load_classifier
from moslim.tree import in_order

_NO_LIMIT = 10**9
"""Tokenizers without a limit say a larger number than this."""


class Scorer:
    """A classifier with its tokenizer: question and answer in, level probabilities out.

    Args:
        classifier: The classifier; it is put into evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, classifier: PreferenceClassifier, tokenizer: PreTrainedTokenizerBase) -> None:
        self.classifier = classifier.eval()
        self.tokenizer = tokenizer
        self._reader = getattr(classifier.backbone, "trunk", classifier.backbone)
        fit_tokenizer(tokenizer, self._reader, str(classifier.name_or_path))
        self._encoder = PairEncoder(tokenizer, pair_limit(classifier.config, tokenizer, self._reader))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", base: str | Path | None = None
    ) -> Scorer:
        """Loads a folder (or Hub name) that holds a classifier, or an adapter of one, and its tokenizer.

        Args:
            folder: Folder or Hub name.
            device: Where it shall run.
            base: Base model of an adapter, if it is not where it was in training.

        Raises:
            FileNotFoundError: There is no such classifier, or an adapter's base model is missing.
            ValueError: A weight is missing or renamed, or the base model is another one.
        """
        return cls(load_classifier(folder, base), load_tokenizer(folder)).to(device)

    def reserve(self, instruction: Sequence[Pattern]) -> None:
        """Takes out of questions and answers what reads as an instruction, too, which a policy could forge."""
        limit = pair_limit(self.classifier.config, self.tokenizer, self._reader)
        self._encoder = PairEncoder(self.tokenizer, limit, instruction)

    @property
    def taken_out(self) -> TakenOut:
        """Number of texts that were scored without something that was taken out of them."""
        return self._encoder.taken_out

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
        self,
        questions: Sequence[Question],
        answers: Sequence[str],
        batch_size: int | None = None,
        share_prefixes: SharePrefixes = "auto",
        tokens: int | None = None,
    ) -> Tensor:
        """Probability of every level of every dimension.

        Pairs of like length are scored together, so that little padding is computed.

        Args:
            questions: ``N`` questions, without any instruction.
            answers: ``N`` answers.
            batch_size: Whole pairs per forward pass; None = as many as ``tokens`` allow.
            share_prefixes: Compute what pairs begin with once, a question and the words that answers have in common;
                ``auto`` does where enough tokens are saved and no ``batch_size`` is given. Backbones that cannot
                compute whole pairs.
            tokens: Most tokens per forward pass, padding included; None = as :func:`pass_tokens` says.

        Returns:
            ``[N, D, K]``, float32 or finer, on the classifier's device, in the order given; 0 on levels that a
            dimension lacks.
        """
        spans = self._encoder.many_spans(questions, answers)
        rows, tokens = [[*prompt, *answer] for prompt, answer in spans], tokens or pass_tokens(self.classifier.device)
        wanted = share_prefixes == "always" or (share_prefixes == "auto" and batch_size is None)
        if rows and wanted and can_share(self.classifier):
            ids, mask = (x.to(self.classifier.device) for x in pad(rows, pad_id(self.tokenizer), left=False))
            lengths = mask.sum(dim=1)
            found = in_order(ids, lengths)
            if share_prefixes == "always" or worthwhile(int(found.new.sum()), int(lengths.sum())):
                features = shared_features(self.classifier, found.parts(tokens))
                return self.classifier.level_probabilities(self.classifier.classify(features).logits)
        return self._apart(rows, batch_size, tokens)

    def _apart(self, rows: list[list[int]], batch_size: int | None, tokens: int) -> Tensor:
        """The same of whole pairs."""
        lengths = list(map(len, rows))
        if batch_size is None:
            parts = list(like_length(lengths, tokens))
        else:
            order = sorted(range(len(rows)), key=lambda row: lengths[row])
            parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        sizes, device = self.preferences.sizes, self.classifier.device
        dtype = at_least_float32(self.classifier.dtype)
        result = torch.zeros(len(rows), len(sizes), max(sizes), device=device, dtype=dtype)
        for chosen in parts:
            ids, mask = pad([rows[i] for i in chosen], pad_id(self.tokenizer), left=False)
            result[chosen] = self.classifier.probabilities(ids.to(device), mask.to(device))
        return result


def pair_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, backbone: Any) -> int | None:
    """Most tokens of a pair: what the classifier was trained on or, if that is not set, what its backbone can read.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        backbone: Its backbone, whose table of positions is never exceeded.
    """
    positions = Positions.of(backbone)
    most = _NO_LIMIT if positions.most is None else positions.most
    if config.pair_length is not None:
        return min(config.pair_length, most)
    limit = min(most, positions.trained or _NO_LIMIT, tokenizer.model_max_length)
    return limit if limit < _NO_LIMIT else None
