"""Scoring of texts with a saved classifier.

Pairs that share a beginning (the same question, or the first words of an answer) share its computation. Scores of rows
are written as JSON Lines.
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
    """Whether what pairs begin with can be computed once: the backbone looks back only, and reads trees."""
    return is_causal(classifier.config.backbone) and reads_trees(classifier.backbone, classifier.device)


def shared_features(classifier: PreferenceClassifier, parts: Iterator[Sequences]) -> Tensor:
    """Pooled hidden states of ``N`` pairs, as :meth:`PreferenceClassifier.features` gives them.

    Args:
        classifier: The classifier.
        parts: The pairs, on its device; those that share a forward pass together.

    Returns:
        ``[N, H]``.
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
    """Returns one plain record per row: the pair, and per dimension what the classifier thinks of it.

    Args:
        rows: ``B`` examples.
        probs: ``[B, D, K]``.
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
    """The fields that a score record copies from its row."""
    name = {} if row.id is None else {"id": row.id}
    asked = {"requested": dict(row.requested)} if row.requested else {}
    return {**name, "question": row.question, **asked, "answer": row.answer}


_NO_LIMIT = 10**9
"""Tokenizers without a limit say a larger number than this."""


@dataclass(frozen=True)
class Scores:
    """Levels of one question-completion pair.

    Args:
        probabilities: Probability of each level, by dimension name and level name.
        levels: Name of the most probable level, by dimension name.
        expected: Expected level as a number (0 = lowest), by dimension name.
    """

    probabilities: dict[str, dict[str, float]]
    levels: dict[str, str]
    expected: dict[str, float]


class Scorer:
    """A reward classifier with its tokenizer: question and completion in, level probabilities out.

    >>> scorer = Scorer("outputs/quickstart/reward/classifier")
    >>> scorer("How do I make tea?", "Boil some water.").expected["formality"]

    Args:
        classifier: Folder or Hub name of a classifier, or of an adapter of one, with its tokenizer; or a classifier,
            which is put into evaluation mode.
        tokenizer: Tokenizer of a classifier that is given as an object.
        device: Device that it runs on. None = for a folder a GPU if there is one, else the CPU; an object stays where
            it is.
        dtype: Type of the weights; None = as they are. Probabilities are float32 or finer either way.
        base: Folder or Hub name of an adapter's base model, if it is not where it was in training.

    Raises:
        MissingFileError: There is no such classifier, or an adapter's base model is missing.
        UsageError: A weight is missing or renamed, the base model is another one, or an object comes without a
            tokenizer.
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
            raise UsageError("a classifier that is an object needs its tokenizer, and takes no `base`")
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
        """Scores question-completion pairs, with the names of dimensions and levels.

        Args:
            pairs: Questions, as texts or chats and without any instruction, each with a completion.
            batch_size: Pairs per forward pass; None = as many as fit.
        """
        questions, completions = [question for question, _ in pairs], [completion for _, completion in pairs]
        table = self.probabilities(questions, completions, batch_size).cpu().double()
        most, expected = table.argmax(-1).tolist(), expected_level(table).tolist()
        dimensions = self.preferences.dimensions
        return [
            Scores(
                {d.name: dict(zip(d.levels, row[i], strict=False)) for i, d in enumerate(dimensions)},
                {d.name: d.levels[most[n][i]] for i, d in enumerate(dimensions)},
                {d.name: expected[n][i] for i, d in enumerate(dimensions)},
            )
            for n, row in enumerate(table.tolist())
        ]

    def reserve(self, instruction: Sequence[ForbiddenText]) -> None:
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
