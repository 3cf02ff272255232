"""Pairs that are read, encoded and batched only when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from moslim.data.checks import place_of
from moslim.data.pairs import CollateRewards, Pair, require_answer
from moslim.data.prompts import PairEncoder
from moslim.data.types import Example, PairBatch
from moslim.errors import UsageError


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
