"""Batch samplers, loaders that resume within an epoch, and the check of all rows at the start of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moslim.data.sanitizing import TakenOut
from moslim.data.types import Example
from moslim.ops.numerics import derive_seed
from moslim.utils.errors import UsageError

_FEW = 3
"""Faults that an error message lists."""


def place_of(row: Example, number: int, what: str = "rows") -> str:
    """Returns the location of a row for messages; its number (from 0) is used if the source gives no place."""
    return row.place or f"row {number + 1} of the {what}"


def usable_rows(
    rows: Sequence[Example], check: Callable[[Example], bool], what: str = "rows", skipped: float = 0.0
) -> list[int]:
    """Returns the indices of the usable rows, and warns of the others.

    Args:
        rows: Rows to check.
        check: Function that raises a :class:`UsageError` for an unusable row, and returns whether text was removed
            from the row, which is reported in a warning.
        what: Name of the rows in messages.
        skipped: Largest share of unusable rows.

    Raises:
        UsageError: The share of unusable rows is larger, or no row is usable.
    """
    kept: list[int] = []
    faults: list[str] = []
    changed = TakenOut()
    for number, row in enumerate(rows):
        try:
            if check(row):
                changed.add(place_of(row, number, what))
        except UsageError as error:
            faults.append(f"{place_of(row, number, what)}: {error}")
        else:
            kept.append(number)
    if len(faults) > skipped * len(rows) or (faults and not kept):
        others = "".join(f"\n{fault}" for fault in faults[1:_FEW])
        raise UsageError(
            f"{faults[0]}{others}\n{len(faults)} of {len(rows)} {what} cannot be used, more than the share that may "
            f"be left out, data.skip_bad_rows = {skipped}: mend the rows, or raise it"
        )
    if faults:
        warnings.warn(
            f"{len(faults)} of {len(rows)} {what} cannot be used and are left out, as data.skip_bad_rows = {skipped} "
            f"allows; the first: {faults[0]}",
            stacklevel=2,
        )
    if changed.texts:
        warnings.warn(f"{what}: {changed}", stacklevel=2)
    return kept


class Rows(Protocol):
    """Data set that is indexed by :class:`Draw`."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw, /) -> Any: ...


_WINDOW = 50
"""Batches in a window within which rows are grouped by length."""

_ALIKE = 1.06
"""Ratio of lengths up to which rows count as equally long in batches with a token budget."""


@dataclass(frozen=True)
class TokenBudget:
    """Limit on the tokens of a batch, instead of a number of rows.

    Args:
        tokens: Most tokens, padding included, in the batch of a process; a longer row is a batch of its own. ``W``
            processes split a global batch of ``W * tokens`` tokens by rows, so the part with the longer rows may
            exceed the limit slightly.
        widths: Tokens of each row, of its longest text if it has several.
        texts: Number of texts of each row.
    """

    tokens: int
    widths: Sequence[int]
    texts: Sequence[int]


class Draw(NamedTuple):
    """Index into a data set: row and epoch, so that random choices for a row can depend on both."""

    epoch: int
    row: int


def share(batch: list[int], rank: int, ranks: int) -> list[int]:
    """Returns a rank's contiguous part of a global batch; the parts differ by at most one row."""
    return batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]


def shuffled_batches(
    rows: Sequence[int], size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Splits rows, in random order, into full batches; remaining rows are dropped.

    Args:
        rows: Row indices.
        size: Rows per batch.
        generator: Random generator of the order.
        lengths: Length of each row of the data set. If given, rows of similar length share a batch, for less padding:
            windows of the shuffled order are sorted by length, and the batches are shuffled.
    """
    shuffled = torch.randperm(len(rows), generator=generator).tolist()
    order = [rows[i] for i in shuffled[: len(rows) - len(rows) % size]]
    if lengths is None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    batches = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW], key=lambda row: lengths[row])
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def budget_batches(
    rows: Sequence[int], budget: TokenBudget, generator: torch.Generator, ranks: int = 1
) -> list[list[int]]:
    """Splits all rows into batches of similar length, in random order.

    The generator shuffles rows whose lengths are within 6% of each other. The number of batches does not depend on the
    generator, so that learning-rate schedules can rely on it.

    Args:
        rows: Row indices, at least one per rank.
        budget: Token limit, and size of every row of the data set.
        generator: Random generator of the order.
        ranks: Number of processes that share a batch; each gets at least one row of it.
    """
    classes = {row: (_length_class(budget.widths[row]), budget.texts[row]) for row in rows}
    widest: dict[int, int] = {}
    for row, (length, _) in classes.items():
        widest[length] = max(widest.get(length, 0), budget.widths[row])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    batches: list[list[int]] = [[]]
    texts = 0
    for row in sorted(shuffled, key=classes.__getitem__):  # stable: only rows of one class change places
        texts += budget.texts[row]
        if len(batches[-1]) >= ranks and texts * widest[classes[row][0]] > budget.tokens * ranks:
            batches.append([])
            texts = budget.texts[row]
        batches[-1].append(row)
    if len(batches) > 1 and len(batches[-1]) < ranks:
        tail = batches.pop()
        batches[-1] += tail
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _length_class(width: int) -> int:
    return int(math.log(max(width, 1), _ALIKE))


def ordered_batches(rows: int, size: int, ranks: int) -> list[list[int]]:
    """Splits the rows, in order, into batches. A last batch with fewer rows than ranks joins the one before it.

    Raises:
        UsageError: There are fewer rows than ranks.
    """
    if rows < ranks:
        raise UsageError(f"{rows} rows cannot be shared out to {ranks} processes: use fewer devices")
    batches = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    if len(batches) > 1 and len(batches[-1]) < ranks:
        tail = batches.pop()
        batches[-1] += tail
    return batches


def full_batches(stages: Sequence[int], size: int, ranks: int) -> list[list[int]]:
    """Returns the rows of each stage, in the order of the stages.

    Args:
        stages: Stage of each row.
        size: Rows per rank and batch.
        ranks: Number of processes.

    Raises:
        UsageError: A stage has too few rows for one batch.
    """
    rows = [[row for row, of_row in enumerate(stages) if of_row == stage] for stage in sorted(set(stages))]
    fewest = min(map(len, rows), default=0)
    if fewest < size * ranks:
        which = " of one stage" if len(rows) > 1 else ""
        raise UsageError(
            f"there are only {fewest} training rows{which}, too few for one batch of {size} on each of {ranks} "
            "processes: lower data.batch_size"
        )
    return rows


class Examples(Dataset[Any]):
    """Base class of the data sets that batch views make. A subclass has a length and is indexed by :class:`Draw`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Any:
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Starts a training epoch. Called before its first draw and before workers copy the data set."""

    def prepare(self) -> None:
        """Does work once in the main process that workers would otherwise repeat in each epoch."""

    def lengths(self) -> list[int] | None:
        """Returns the tokens of each row, of its longest text if it has several; None = not grouped by length."""
        return None

    def budget(self, tokens: int) -> TokenBudget | None:
        """Returns a budget for batches of ``tokens`` padded tokens; None if all rows have the same size."""
        return None

    def origins(self) -> Sequence[Any]:
        """Returns the content of each row that predictions depend on."""
        return [self[Draw(0, row)] for row in range(len(self))]


class Remaining(Examples):
    """View of a data set that starts at a given row.

    Args:
        examples: Data set.
        first: Index of the first row.
    """

    def __init__(self, examples: Examples, first: int) -> None:
        self._examples, self._first = examples, first

    def __len__(self) -> int:
        return len(self._examples) - self._first

    def __getitem__(self, draw: Draw) -> Any:
        """Returns a row, counted from ``first``."""
        return self._examples[Draw(draw.epoch, draw.row + self._first)]


class RepeatBatchSampler(Sampler[list[Draw]]):
    """Batch sampler that yields each batch ``repeats`` times; every rank gets its part of the same global batch.

    The order depends only on seed and epoch. The parts of ``W`` ranks with batch size ``B`` together are the batch of
    one process with batch size ``W * B``.

    Args:
        rows: Number of rows.
        batch_size: Rows per rank and batch.
        seed: Seed of the order.
        repeats: Number of consecutive times that each batch is yielded.
        rank: Rank of this process.
        ranks: Number of processes.
        lengths: Length of each row, to group rows of similar length.
        stages: Stage of each row; an epoch goes through the stages in order. None = a single stage.
        same_epochs: Whether every epoch repeats the first, as with ``Trainer(overfit_batches=...)``.
        budget: Token budget, which replaces ``batch_size`` and ``lengths``; no row is dropped then.

    Raises:
        UsageError: A stage has too few rows for one batch, or ``stages`` has not one entry per row.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int = 0,
        repeats: int = 1,
        rank: int = 0,
        ranks: int = 1,
        lengths: Sequence[int] | None = None,
        stages: Sequence[int] | None = None,
        same_epochs: bool = False,
        budget: TokenBudget | None = None,
    ) -> None:
        staged = [0] * rows if stages is None else stages
        if len(staged) != rows:
            raise UsageError(f"stages has {len(staged)} entries for {rows} rows")
        self._stages = full_batches(staged, 1 if budget else batch_size, ranks)
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self.rank, self.ranks, self.lengths = rank, ranks, lengths
        self.same_epochs, self.budget = same_epochs, budget
        self._count = len(self._batches(torch.Generator()))
        self.epoch = 0
        self.start = 0
        self._current: tuple[int, list[list[int]]] | None = None  # current epoch and its global batches
        self.sampler = self  # Lightning calls set_epoch on `batch_sampler.sampler`, never on the batch sampler

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, and so the order, of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count * self.repeats

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yields the batches of the epoch from index ``start``, then resets ``start`` to 0."""
        start, self.start = self.start, 0
        epoch = 0 if self.same_epochs else self.epoch
        self._current = epoch, self._batches(torch.Generator().manual_seed(derive_seed(self.seed, epoch)))
        for number in range(start, len(self)):
            yield self.draws(number)

    def draws(self, number: int) -> list[Draw]:
        """Returns this rank's part of a batch of the current epoch."""
        assert self._current is not None
        epoch, batches = self._current
        return [Draw(epoch, row) for row in share(batches[number // self.repeats], self.rank, self.ranks)]

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        """Returns the global batches of an epoch; their number does not depend on the generator."""
        if self.budget is not None:
            return [
                batch for rows in self._stages for batch in budget_batches(rows, self.budget, generator, self.ranks)
            ]
        size = self.batch_size * self.ranks
        return [batch for rows in self._stages for batch in shuffled_batches(rows, size, generator, self.lengths)]


class ResumableLoader(DataLoader[Any]):
    """Loader that saves its position in checkpoints, with any number of workers.

    Args:
        dataset: Rows, indexed by :class:`Draw`.
        sampler: Batch sampler.
        collate: Function that makes a batch of a list of items.
        position: Function that returns (epoch, batches finished in it) when a checkpoint is saved. Batches that
            workers prepared ahead are not finished.
        workers: Number of worker processes.
        start_epoch: Function called with the epoch before its first draw and before workers copy the data set.
    """

    batch_sampler: RepeatBatchSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: RepeatBatchSampler,
        collate: Callable[[list[Any]], Any],
        position: Callable[[], tuple[int, int]],
        workers: int = 0,
        start_epoch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        self._position = position
        self._start_epoch = start_epoch

    def __iter__(self) -> Any:
        if self._start_epoch is not None:
            self._start_epoch(0 if self.batch_sampler.same_epochs else self.batch_sampler.epoch)
        return super().__iter__()

    def together(self, numbers: range) -> Any:
        """Returns one batch of all rows in several batches of the current epoch, made in the main process."""
        rows: Any = self.dataset
        assert self.collate_fn is not None
        return self.collate_fn([rows[draw] for number in numbers for draw in self.batch_sampler.draws(number)])

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and the number of batches finished in it."""
        epoch, done = self._position()
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start after the finished batches."""
        self.batch_sampler.set_epoch(state["epoch"])  # at the end of an epoch, the next one
        self.batch_sampler.start = state["done"]


class OrderedBatches:
    """Batches of all rows in order, for evaluation. Every row is in exactly one batch of one rank.

    Args:
        dataset: Rows, indexed by :class:`Draw`.
        batch_size: Rows per rank and batch.
        collate: Function that makes a batch of a list of items.
        rank: Rank of this process.
        ranks: Number of processes; all have the same number of batches.

    Raises:
        UsageError: There are fewer rows than processes.
    """

    def __init__(
        self, dataset: Rows, batch_size: int, collate: Callable[[list[Any]], Any], rank: int = 0, ranks: int = 1
    ) -> None:
        batches = ordered_batches(len(dataset), batch_size * ranks, ranks)
        self._dataset, self._collate = dataset, collate
        self._batches = [share(batch, rank, ranks) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield self._collate([self._dataset[Draw(0, row)] for row in batch])
