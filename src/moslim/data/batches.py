"""Question-answer pairs as batches, from a list or streamed.

Question-answer pairs as batches.

Pairs that are read, encoded and batched only when they are asked for.
"""

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
    """One encoded pair.

    Args:
        prompt: Ids up to the answer.
        answer: Ids of the answer and its end token.
        row: The example, as the source gave it.
        rejected: Ids of prompt and rejected answer, if the row has one.
        features: What a frozen backbone made of the pair, ``[H]``, and of the rejected one; empty = to be run.
    """

    prompt: list[int]
    answer: list[int]
    row: Example
    rejected: list[int] | None = None
    features: list[Tensor] = field(default_factory=list)

    @property
    def texts(self) -> list[list[int]]:
        """Ids of the pair and, if there is one, of the rejected pair."""
        pair = self.prompt + self.answer
        return [pair] if self.rejected is None else [pair, self.rejected]


class Pairs(Examples):
    """Encodes rows on first use and keeps the ids.

    Args:
        rows: Rows with answers.
        encoder: Makes the ids.
        instructed: Levels that the instruction of each row's question names; None = questions without instruction.

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
            wanted = None if self._instructed is None else self._instructed[draw.row]
            rejected = None if row.rejected is None else self._encoder.encode(row.question, row.rejected, wanted)
            self._encoded[draw.row] = Pair(*self._encoder.spans(row.question, row.answer or "", wanted), row, rejected)
        return self._encoded[draw.row]

    def prepare(self) -> None:
        """Encodes all rows."""
        self._all()

    def lengths(self) -> list[int] | None:
        """Tokens of each row, of its longer text where it has two; all rows are encoded for it."""
        return None if self.computed else [max(map(len, pair.texts)) for pair in self._all()]

    def budget(self, tokens: int) -> TokenBudget | None:
        """See the base class."""
        lengths = self.lengths()
        return None if lengths is None else TokenBudget(tokens, lengths, [len(pair.texts) for pair in self._all()])

    def origins(self) -> list[Example]:
        """Returns the rows, which need not be encoded for it."""
        return self._rows

    def compute(self, features: Callable[[list[list[int]]], Tensor]) -> None:
        """Gives every pair its features, so that batches come with these instead of tokens.

        Args:
            features: Returns ``[N, H]`` of ``N`` lists of ids.
        """
        pairs = self._all()
        found = iter(features([ids for pair in pairs for ids in pair.texts]).unbind())
        for pair in pairs:
            pair.features = [next(found) for _ in pair.texts]

    @property
    def computed(self) -> bool:
        """Whether pairs have features, which are all of one length."""
        return bool(len(self) and self[Draw(0, 0)].features)

    def _all(self) -> list[Pair]:
        return [self[Draw(0, row)] for row in range(len(self))]


@dataclass
class CollateRewards:
    """Makes a :class:`PairBatch`; what is said about dimensions that are not in ``preferences`` is left out."""

    preferences: PreferenceSet
    pad: int

    def __call__(self, pairs: list[Pair]) -> PairBatch:
        """Right-pads the pairs, and the rejected answers after them; or stacks the features of all.

        Raises:
            UsageError: A label or vote is a level that the dimension lacks.
        """
        rejected = [i for i, pair in enumerate(pairs) if pair.rejected is not None]
        places = [(pair, 0) for pair in pairs] + [(pairs[i], 1) for i in rejected]
        features = None
        if pairs[0].features:
            features = torch.stack([pair.features[place] for pair, place in places])
            ids = mask = torch.zeros(len(places), 0, dtype=torch.long)
        else:
            ids, mask = pad([pair.texts[place] for pair, place in places], self.pad, left=False)
        rows = [pair.row for pair in pairs]
        compared = [rows[i] for i in rejected]
        rows += [replace(row, answer=row.rejected, levels={}, votes={}, rejected=None) for row in compared]
        masks = [self._comparison_mask(row) for row in compared]
        levels = torch.stack([self.preferences.encode(known_levels(row.levels, self.preferences)) for row in rows])
        return PairBatch(
            ids,
            mask,
            levels,
            level_shares(rows, levels, self.preferences),
            rows,
            chosen=torch.tensor(rejected, dtype=torch.long),
            rejected=torch.arange(len(pairs), len(rows)),
            comparison_mask=torch.tensor(masks, dtype=torch.bool).view(-1, levels.shape[1]),
            margins=torch.tensor([row.margin for row in compared], dtype=torch.float32),
            features=features,
        )

    def _comparison_mask(self, row: Example) -> list[bool]:
        return [not row.comparison_dimensions or name in row.comparison_dimensions for name in self.preferences.names]


@dataclass
class CollateTexts:
    """Makes a :class:`TextBatch`, whose loss is on the answer and its end token only."""

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
    """Returns levels by dimension name, without those of dimensions that are not in use."""
    return Preference({name: level for name, level in levels.items() if name in preferences.names})


def level_shares(rows: Sequence[Example], levels: Tensor, preferences: PreferenceSet) -> Tensor:
    """Share of the raters that gave each level: of a row's votes where it has them, else all on its label.

    Args:
        rows: ``B`` examples.
        levels: ``[B, D]`` their labels, -1 = not labelled.
        preferences: The ``D`` dimensions.

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
                    preferences.encode(Preference({name: level}))  # refuses what the dimension lacks
                shares[b, d] = torch.tensor(votes).bincount(minlength=width).float() / len(votes)
    return shares


def unrounded(batch: PairBatch, preferences: PreferenceSet) -> PairBatch:
    """Returns the batch with shares and margins in float32 where Lightning has rounded all inputs to 16 bits."""
    if batch.targets.dtype == at_least_float32(batch.targets.dtype):
        return batch
    shares = level_shares(batch.rows, batch.levels.cpu(), preferences).to(batch.targets.device)
    margins = [batch.rows[row].margin for row in batch.chosen.tolist()]
    return replace(
        batch, targets=shares, margins=torch.tensor(margins, dtype=torch.float32, device=batch.margins.device)
    )


def one_hot(levels: Tensor, width: int) -> Tensor:
    """Returns ``[B, D, width]`` float32 with a 1 on each label of ``[B, D]``; all 0 where it is -1."""
    return F.one_hot(levels.clamp(min=0), width).float() * (levels >= 0)[..., None]


@dataclass
class StreamedPairs:
    """All pairs in order, with one batch of them in memory.

    Args:
        rows: Begins a pass over the rows.
        encoder: What makes the ids.
        collate: Makes a batch of pairs.
        batch_size: Pairs per batch.
        skip: Rows at the start to leave out. Batches end where they would end without this.
    """

    rows: Callable[[], Iterator[Example]]
    encoder: PairEncoder
    collate: CollateRewards
    batch_size: int
    skip: int = 0

    def __iter__(self) -> Iterator[PairBatch]:
        """Yields batches; there is no length, since nobody has counted the rows.

        Raises:
            UsageError: There are no rows, or one has no answer or cannot be used.
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
