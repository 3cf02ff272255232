"""Scoring of texts with a saved classifier, and records of scores.

A prefix that several pairs share (the question, or the first words of completions) can be computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moslim.data.prompts import PairEncoder, pad, pad_id
from moslim.data.sanitizing import ForbiddenText, TakenOut
from moslim.data.types import Example, Question
from moslim.ops.length_bucketing import SharePrefixes, like_length, pass_tokens, worthwhile
from moslim.ops.loading import is_causal
from moslim.ops.models import Positions, chosen_device, fit_tokenizer, load_tokenizer
from moslim.ops.numerics import at_least_float32
from moslim.ops.prefix_tree import Sequences, along, in_order, reads_trees
from moslim.preferences import PreferenceSet, expected_level
from moslim.reward.classifier_export import load_classifier
from moslim.reward.modeling import PreferenceClassifier, pool
from moslim.utils.errors import UsageError


def can_share(classifier: PreferenceClassifier) -> bool:
    """Whether pairs can share the computation of prefixes: the backbone is causal and supports prefix trees."""
    return is_causal(classifier.config.backbone) and reads_trees(classifier.backbone, classifier.device)


def shared_features(classifier: PreferenceClassifier, parts: Iterator[Sequences]) -> Tensor:
    """Returns the features of ``N`` pairs, with each shared prefix computed once.

    Args:
        classifier: The classifier.
        parts: The pairs of each forward pass, on the classifier's device.

    Returns:
        ``[N, H]``, as :meth:`PreferenceClassifier.features` gives them.
    """
    features, order = [], []
    for part in parts:
        tree = part.tree()
        with along(classifier.backbone, tree) as inputs:
            nodes = classifier.states(**inputs)[0]
        mask = (torch.arange(tree.nodes.shape[1], device=nodes.device) < part.lengths[:, None]).long()
        features.append(pool(nodes[tree.nodes], mask, classifier.config.pooling))
        order.append(part.order)
    return torch.cat(features)[torch.cat(order).argsort()]


def prediction_rows(rows: Sequence[Example], probs: Tensor, preferences: PreferenceSet) -> list[dict[str, Any]]:
    """Returns one record per row: the pair, and its level probabilities, level and expected level by dimension.

    Args:
        rows: ``B`` examples.
        probs: ``[B, D, K]``, level probabilities.
        preferences: The ``D`` dimensions.
    """
    table = probs.cpu().double()
    levels = table.argmax(-1)
    expected = expected_level(table)
    records = []
    for b, row in enumerate(rows):
        scores: dict[str, dict[str, Any]] = {"probabilities": {}, "levels": {}, "expected": {}}
        for d, dimension in enumerate(preferences.dimensions):
            size = len(dimension.levels)
            scores["probabilities"][dimension.name] = [round(p, 6) for p in table[b, d, :size].tolist()]
            scores["levels"][dimension.name] = int(levels[b, d])
            scores["expected"][dimension.name] = round(expected[b, d].item(), 6)
        records.append({**carried(row), **scores})
    return records


def carried(row: Example) -> dict[str, Any]:
    """Returns the fields that a score record copies from its row."""
    row_id = {} if row.id is None else {"id": row.id}
    requested = {"requested": dict(row.requested)} if row.requested else {}
    return {**row_id, "question": row.question, **requested, "answer": row.answer}


_NO_LIMIT = 10**9
"""Bound on length limits; tokenizers without a limit have a larger ``model_max_length``."""


@dataclass(frozen=True)
class Scores:
    """Level probabilities of one question-completion pair.

    Args:
        probabilities: Probability of each level, by dimension name and level name.
        levels: Name of the most probable level, by dimension name.
        expected: Expected level as a number (0 = lowest), by dimension name.
    """

    probabilities: dict[str, dict[str, float]]
    levels: dict[str, str]
    expected: dict[str, float]


class Scorer:
    """Reward classifier with its tokenizer, which predicts level probabilities of question-completion pairs.

    >>> scorer = Scorer("outputs/quickstart/reward/classifier")
    >>> scorer("How do I make tea?", "Boil some water.").expected["formality"]

    Args:
        classifier: Folder or Hub name of a saved classifier in the merged or adapter form; or a classifier, which is
            set to evaluation mode.
        tokenizer: Tokenizer, required if ``classifier`` is an object; None = the one in the folder.
        device: Device of the classifier; None = for a folder the GPU if there is one, else the CPU; for an object its
            current device.
        dtype: Type of the weights; None = unchanged. Probabilities have float32 or higher precision in either case.
        base: Folder or Hub name of the base model of the adapter form; None = the one that the adapter names.

    Raises:
        MissingFileError: The classifier or an adapter's base model does not exist.
        UsageError: A weight is missing or renamed, the base model has other weights, an object comes without a
            tokenizer, or ``base`` is given for a classifier that needs none.
    """

    def __init__(
        self,
        classifier: str | Path | PreferenceClassifier,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        base: str | Path | None = None,
    ) -> None:
        if isinstance(classifier, str | Path):
            tokenizer = tokenizer or load_tokenizer(classifier)
            classifier, device = load_classifier(classifier, base), chosen_device(device)
        elif tokenizer is None or base is not None:
            raise UsageError(
                "Scorer: a classifier object needs its tokenizer and no `base`: give Scorer(classifier, tokenizer)"
            )
        self.classifier = classifier.eval()
        if device is not None or dtype is not None:
            self.classifier.to(device=device, dtype=dtype)
        self.tokenizer = tokenizer
        self._reader = getattr(classifier.backbone, "transformer", classifier.backbone)
        fit_tokenizer(tokenizer, self._reader, str(classifier.name_or_path))
        self._encoder = PairEncoder(tokenizer, pair_limit(classifier.config, tokenizer, self._reader))

    def __call__(self, question: Question, completion: str) -> Scores:
        """Scores one pair; see :meth:`score`."""
        return self.score([(question, completion)])[0]

    def score(self, pairs: Sequence[tuple[Question, str]], batch_size: int | None = None) -> list[Scores]:
        """Scores question-completion pairs.

        Args:
            pairs: Questions (texts or chats, without an instruction) with one completion each.
            batch_size: Pairs per forward pass; None = as many as fit.

        Returns:
            One :class:`Scores` per pair, in their order.
        """
        questions, completions = [question for question, _ in pairs], [completion for _, completion in pairs]
        table = self.probabilities(questions, completions, batch_size).cpu().double()
        levels, expected = table.argmax(-1).tolist(), expected_level(table).tolist()
        dimensions = self.preferences.dimensions
        return [
            Scores(
                {d.name: dict(zip(d.levels, row[i], strict=False)) for i, d in enumerate(dimensions)},
                {d.name: d.levels[levels[n][i]] for i, d in enumerate(dimensions)},
                {d.name: expected[n][i] for i, d in enumerate(dimensions)},
            )
            for n, row in enumerate(table.tolist())
        ]

    def reserve(self, instruction: Sequence[ForbiddenText]) -> None:
        """Makes the scorer remove texts that read as an instruction, which a policy could forge.

        Args:
            instruction: Patterns to remove from questions and completions.
        """
        limit = pair_limit(self.classifier.config, self.tokenizer, self._reader)
        self._encoder = PairEncoder(self.tokenizer, limit, instruction)

    @property
    def taken_out(self) -> TakenOut:
        """Count of texts from which forbidden text was removed before scoring."""
        return self._encoder.taken_out

    @property
    def preferences(self) -> PreferenceSet:
        """The dimensions, in the order of the ``D`` axis."""
        return self.classifier.preferences

    def to(self, device: str | torch.device) -> Scorer:
        """Moves the classifier to a device and returns the scorer."""
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
        """Returns the probability of each level of each dimension.

        Pairs of similar length share a forward pass, which reduces padding.

        Args:
            questions: ``N`` questions, without an instruction.
            answers: ``N`` completions.
            batch_size: Pairs per forward pass if no prefixes are shared; None = as many as ``tokens`` allows.
            share_prefixes: Whether to compute a prefix that several pairs share once. ``auto`` does so if it saves
                enough tokens and ``batch_size`` is None. Without effect if the backbone cannot (:func:`can_share`).
            tokens: Maximum number of tokens per forward pass, including padding; None = :func:`pass_tokens`.

        Returns:
            ``[N, D, K]`` in float32 or higher precision, on the classifier's device; 0 on absent levels.
        """
        spans = self._encoder.many_spans(questions, answers)
        rows, tokens = [[*prompt, *answer] for prompt, answer in spans], tokens or pass_tokens(self.classifier.device)
        may_share = share_prefixes == "always" or (share_prefixes == "auto" and batch_size is None)
        if rows and may_share and can_share(self.classifier):
            ids, mask = (x.to(self.classifier.device) for x in pad(rows, pad_id(self.tokenizer), left=False))
            lengths = mask.sum(dim=1)
            sequences = in_order(ids, lengths)
            if share_prefixes == "always" or worthwhile(int(sequences.new.sum()), int(lengths.sum())):
                features = shared_features(self.classifier, sequences.parts(tokens))
                return self.classifier.level_probabilities(self.classifier.classify(features).logits)
        return self._unshared(rows, batch_size, tokens)

    def _unshared(self, rows: list[list[int]], batch_size: int | None, tokens: int) -> Tensor:
        """Returns the level probabilities of pairs, without shared prefixes."""
        lengths = list(map(len, rows))
        if batch_size is None:
            parts = list(like_length(lengths, tokens))
        else:
            order = sorted(range(len(rows)), key=lambda row: lengths[row])
            parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        sizes, device = self.preferences.sizes, self.classifier.device
        dtype = at_least_float32(self.classifier.dtype)
        result = torch.zeros(len(rows), len(sizes), max(sizes), device=device, dtype=dtype)
        for row_indices in parts:
            ids, mask = pad([rows[i] for i in row_indices], pad_id(self.tokenizer), left=False)
            result[row_indices] = self.classifier.probabilities(ids.to(device), mask.to(device))
        return result


def pair_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, backbone: Any) -> int | None:
    """Returns the maximum number of tokens of a pair; None = no limit.

    It is the limit of training or, if there was none, the smallest of the backbone's and the tokenizer's. The
    backbone's table of positions is never exceeded.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        backbone: Its backbone.
    """
    positions = Positions.of(backbone)
    max_positions = _NO_LIMIT if positions.most is None else positions.most
    if config.pair_length is not None:
        return min(config.pair_length, max_positions)
    limit = min(max_positions, positions.trained or _NO_LIMIT, tokenizer.model_max_length)
    return limit if limit < _NO_LIMIT else None
