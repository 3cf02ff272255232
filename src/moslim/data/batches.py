"""Batches of question-answer pairs, from rows in memory (:class:`Pairs`) or streamed (:class:`StreamedPairs`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from moslim.data.loader import Draw, Examples, TokenBudget, place_of
from moslim.data.prompts import PairEncoder, pad
from moslim.data.types import Example, PairBatch, TextBatch
from moslim.ops.numerics import at_least_float32
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError


@dataclass
class Pair:
    """Encoded question-answer pair.

    Args:
        prompt: Token ids before the answer.
        answer: Token ids of the answer and its end token.
        row: Example, as the source gave it.
        rejected: Token ids of prompt and rejected answer, if the row has one.
        features: Pooled hidden states ``[H]`` from a frozen backbone, of the pair and of the rejected one; empty =
            not computed.
    """

    prompt: list[int]
    answer: list[int]
    row: Example
    rejected: list[int] | None = None
    features: list[Tensor] = field(default_factory=list)

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of the pair and, if there is one, of the rejected pair."""
        ids = self.prompt + self.answer
        return [ids] if self.rejected is None else [ids, self.rejected]


class Pairs(Examples):
    """Data set of pairs. Encodes rows on first use and keeps the token ids.

    Args:
        rows: Rows with answers.
        encoder: Encoder of pairs.
        instructed: Preference that each row's prompt requests; None = prompts without instruction.

    Raises:
        UsageError: A row has no answer.
    """

    def __init__(
        self, rows: list[Example], encoder: PairEncoder, instructed: Sequence[Preference] | None = None
    ) -> None:
        for i, row in enumerate(rows):
            require_answer(i, row)
        self._rows, self._encoder, self._instructed = rows, encoder, instructed
        self._encoded: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, draw: Draw) -> Pair:
        """Returns the pair of a row; it is the same in every epoch."""
        if draw.row not in self._encoded:
            row = self._rows[draw.row]
            preference = None if self._instructed is None else self._instructed[draw.row]
            rejected = None if row.rejected is None else self._encoder.encode(row.question, row.rejected, preference)
            prompt, answer = self._encoder.spans(row.question, row.answer or "", preference)
            self._encoded[draw.row] = Pair(prompt, answer, row, rejected)
        return self._encoded[draw.row]

    def prepare(self) -> None:
        """Encodes all rows."""
        self._all()

    def lengths(self) -> list[int] | None:
        """Returns the tokens of each row, of its longer text if it has two. Encodes all rows."""
        return None if self.computed else [max(map(len, pair.texts)) for pair in self._all()]

    def budget(self, tokens: int) -> TokenBudget | None:
        """See the base class."""
        lengths = self.lengths()
        return None if lengths is None else TokenBudget(tokens, lengths, [len(pair.texts) for pair in self._all()])

    def origins(self) -> list[Example]:
        """Returns the rows, without encoding them."""
        return self._rows

    def compute(self, features: Callable[[list[list[int]]], Tensor]) -> None:
        """Computes the features of every pair, so that batches hold these instead of tokens.

        Args:
            features: Function from ``N`` lists of token ids to ``[N, H]``.
        """
        pairs = self._all()
        vectors = iter(features([ids for pair in pairs for ids in pair.texts]).unbind())
        for pair in pairs:
            pair.features = [next(vectors) for _ in pair.texts]

    @property
    def computed(self) -> bool:
        """Whether the features of the pairs are computed."""
        return bool(len(self) and self[Draw(0, 0)].features)

    def _all(self) -> list[Pair]:
        return [self[Draw(0, row)] for row in range(len(self))]


@dataclass
class CollateRewards:
    """Collates pairs to a :class:`PairBatch`.

    Args:
        preferences: Dimensions of the labels; labels of other dimensions are dropped.
        pad: Id of padding tokens.
    """

    preferences: PreferenceSet
    pad: int

    def __call__(self, pairs: list[Pair]) -> PairBatch:
        """Right-pads the pairs, followed by the rejected ones; or stacks their features.

        Raises:
            UsageError: A label or vote is a level that the dimension lacks.
        """
        chosen = [i for i, pair in enumerate(pairs) if pair.rejected is not None]
        texts = [(pair, 0) for pair in pairs] + [(pairs[i], 1) for i in chosen]  # pair, index in `Pair.texts`
        features = None
        if pairs[0].features:
            features = torch.stack([pair.features[index] for pair, index in texts])
            ids = mask = torch.zeros(len(texts), 0, dtype=torch.long)
        else:
            ids, mask = pad([pair.texts[index] for pair, index in texts], self.pad, left=False)
        rows = [pair.row for pair in pairs]
        comparisons = [rows[i] for i in chosen]
        rows += [replace(row, answer=row.rejected, levels={}, votes={}, rejected=None) for row in comparisons]
        masks = [self._comparison_mask(row) for row in comparisons]
        levels = torch.stack([self.preferences.encode(known_levels(row.levels, self.preferences)) for row in rows])
        return PairBatch(
            ids,
            mask,
            levels,
            level_shares(rows, levels, self.preferences),
            rows,
            chosen=torch.tensor(chosen, dtype=torch.long),
            rejected=torch.arange(len(pairs), len(rows)),
            comparison_mask=torch.tensor(masks, dtype=torch.bool).view(-1, levels.shape[1]),
            margins=torch.tensor([row.margin for row in comparisons], dtype=torch.float32),
            features=features,
        )

    def _comparison_mask(self, row: Example) -> list[bool]:
        return [not row.comparison_dimensions or name in row.comparison_dimensions for name in self.preferences.names]


@dataclass
class CollateTexts:
    """Collates pairs to a :class:`TextBatch`; only the answer and its end token are labelled.

    Args:
        pad: Id of padding tokens.
    """

    pad: int

    def __call__(self, pairs: list[Pair]) -> TextBatch:
        """Right-pads the pairs."""
        ids, mask = pad([pair.prompt + pair.answer for pair in pairs], self.pad, left=False)
        labels, _ = pad([[-100] * len(pair.prompt) + pair.answer for pair in pairs], -100, left=False)
        return TextBatch(ids, mask, labels, [pair.row for pair in pairs])


def require_answer(number: int, row: Example) -> str:
    """Returns a row's answer.

    Raises:
        UsageError: There is none.
    """
    if row.answer is None:
        where = row.place or f"row {number} of the source"
        raise UsageError(f"{where} has no answer, which this view needs: {row.question!r}")
    return row.answer


def known_levels(levels: Mapping[str, int], preferences: PreferenceSet) -> Preference:
    """Returns the levels of the dimensions in use."""
    return Preference({name: level for name, level in levels.items() if name in preferences.names})


def level_shares(rows: Sequence[Example], levels: Tensor, preferences: PreferenceSet) -> Tensor:
    """Returns the soft labels: the share of votes for each level, or a one-hot label where a row has no votes.

    Args:
        rows: ``B`` examples.
        levels: ``[B, D]`` labels, -1 = not labelled.
        preferences: ``D`` dimensions.

    Returns:
        ``[B, D, K]`` float32, all 0 where there is neither vote nor label.

    Raises:
        UsageError: A vote is a level that the dimension lacks.
    """
    width = max(preferences.sizes)
    shares = one_hot(levels, width)
    for b, row in enumerate(rows):
        for d, name in enumerate(preferences.names):
            if votes := row.votes.get(name):
                for level in set(votes):
                    preferences.encode(Preference({name: level}))  # raises if the dimension lacks the level
                shares[b, d] = torch.tensor(votes).bincount(minlength=width).float() / len(votes)
    return shares


def unrounded(batch: PairBatch, preferences: PreferenceSet) -> PairBatch:
    """Returns the batch with ``targets`` and ``margins`` in float32, where Lightning rounded them to 16 bits."""
    if batch.targets.dtype == at_least_float32(batch.targets.dtype):
        return batch
    shares = level_shares(batch.rows, batch.levels.cpu(), preferences).to(batch.targets.device)
    margins = [batch.rows[row].margin for row in batch.chosen.tolist()]
    return replace(
        batch, targets=shares, margins=torch.tensor(margins, dtype=torch.float32, device=batch.margins.device)
    )


def one_hot(levels: Tensor, width: int) -> Tensor:
    """Returns the one-hot labels ``[B, D, width]`` float32 of ``[B, D]``; all 0 for -1."""
    return F.one_hot(levels.clamp(min=0), width).float() * (levels >= 0)[..., None]


@dataclass
class StreamedPairs:
    """Batches of all pairs in order; only one batch is in memory.

    Args:
        rows: Function that starts a pass over the rows.
        encoder: Encoder of pairs.
        collate: Function that makes a batch of pairs.
        batch_size: Pairs per batch.
        skip: Rows to skip at the start. The remaining batches end at the same rows as without it.
    """

    rows: Callable[[], Iterator[Example]]
    encoder: PairEncoder
    collate: CollateRewards
    batch_size: int
    skip: int = 0

    def __iter__(self) -> Iterator[PairBatch]:
        """Yields the batches, whose number is not known in advance.

        Raises:
            UsageError: There are no rows, or a row has no answer or is unusable.
        """
        rows = enumerate(self.rows())
        seen = sum(1 for _ in islice(rows, self.skip))
        while chunk := list(islice(rows, self.batch_size - seen % self.batch_size)):
            seen += len(chunk)
            yield self.collate([self._pair(number, row) for number, row in chunk])
        if self.encoder.taken_out.texts:
            warnings.warn(f"predict: {self.encoder.taken_out}", stacklevel=2)
        if not seen:
            raise UsageError("the source has no rows to score; a Table takes them from data.source.predict")

    def _pair(self, number: int, row: Example) -> Pair:
        answer = require_answer(number, row)
        try:
            self.encoder.check(row.question, answer)
        except UsageError as error:
            raise UsageError(f"{place_of(row, number, 'predict rows')}: {error}") from error
        return Pair(*self.encoder.spans(row.question, answer), row)
