"""Which rows make which batch, how an interrupted epoch continues, and the check of every row.

Every row is looked at when a run begins, so that none stops it later.

Which rows make which batch, and how an interrupted epoch goes on where it stopped.
"""

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


def place_of(row: Example, number: int, what: str = "rows") -> str:
    """Returns where a row stands, by its number from 0 where the source does not say."""
    return row.place or f"row {number + 1} of the {what}"


def usable_rows(
    rows: Sequence[Example], check: Callable[[Example], bool], what: str = "rows", skipped: float = 0.0
) -> list[int]:
    """Returns the numbers of the rows that can be used, and warns of those that cannot.

    Args:
        rows: The rows.
        check: Raises a :class:`UsageError` for a row that cannot be used. It returns whether something is taken out of
            the row's texts, which is said in a warning.
        what: What the rows are called.
        skipped: Largest share of them that may be left out.

    Raises:
        UsageError: More rows cannot be used; or none can be.
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
    """A data set whose rows are asked for by :class:`Draw`."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw, /) -> Any: ...


_WINDOW = 50
"""Batches among which rows of like length are grouped."""


_ALIKE = 1.06
"""Ratio of lengths up to which rows of a token budget count as equally long."""


@dataclass(frozen=True)
class TokenBudget:
    """Batches by what they cost instead of by rows.

    Args:
        tokens: Most tokens of a process's batch, padding included; a row that is longer makes a batch of its own.
            Several processes have the batch of one with as many times the tokens, cut by rows: the part with the longer
            rows may exceed the budget by their difference.
        widths: Tokens of each row; of its longest text, where it has several.
        texts: Texts of each row.
    """

    tokens: int
    widths: Sequence[int]
    texts: Sequence[int]


class Draw(NamedTuple):
    """What a data set is asked for: a row, in an epoch, so that what is drawn for it can depend on both."""

    epoch: int
    row: int


def share(batch: list[int], rank: int, ranks: int) -> list[int]:
    """Returns a rank's part of a global batch: contiguous, and all of one size where the batch divides evenly."""
    return batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]


def shuffled_batches(
    rows: Sequence[int], size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Cuts rows, in random order, into full batches; the rows left over are dropped.

    Args:
        rows: The rows' numbers.
        size: Rows of a batch.
        generator: What makes the order.
        lengths: Length of each row of the data set. If given, rows of like length share a batch: windows of the
            shuffled order are sorted by length, and their batches are shuffled, so that there is little padding.
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
    """Cuts all rows into batches of like length, in random order.

    Rows whose lengths are within 6% of each other are mixed anew by each generator. The number of batches is the same
    for all generators, as a schedule needs it.

    Args:
        rows: The rows' numbers, at least one per rank.
        budget: Length and price of every row of the data set.
        generator: What makes the order.
        ranks: Number of processes that share a batch; each has at least one row of it.
    """
    kinds = {row: (_length_class(budget.widths[row]), budget.texts[row]) for row in rows}
    widest: dict[int, int] = {}
    for row, (length, _) in kinds.items():
        widest[length] = max(widest.get(length, 0), budget.widths[row])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    batches: list[list[int]] = [[]]
    texts = 0
    for row in sorted(shuffled, key=kinds.__getitem__):  # stable: the kinds stand in the same order in every epoch
        texts += budget.texts[row]
        if len(batches[-1]) >= ranks and texts * widest[kinds[row][0]] > budget.tokens * ranks:
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
    """Cuts the rows, in order, into batches. A last one with fewer rows than ranks joins the one before it.

    Raises:
        UsageError: There are fewer rows than ranks, so that a rank would have nothing to do.
    """
    if rows < ranks:
        raise UsageError(f"{rows} rows cannot be shared out to {ranks} processes: use fewer devices")
    batches = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    if len(batches) > 1 and len(batches[-1]) < ranks:
        tail = batches.pop()
        batches[-1] += tail
    return batches


def full_batches(stages: Sequence[int], size: int, ranks: int) -> list[list[int]]:
    """Returns the rows of each stage, the first stage first.

    Args:
        stages: Stage of each row.
        size: Rows per rank and batch.
        ranks: Number of processes.

    Raises:
        UsageError: A stage has too few rows for a single batch.
    """
    rows = [[row for row, own in enumerate(stages) if own == stage] for stage in sorted(set(stages))]
    fewest = min(map(len, rows), default=0)
    if fewest < size * ranks:
        which = " of one stage" if len(rows) > 1 else ""
        raise UsageError(
            f"there are only {fewest} training rows{which}, too few for one batch of {size} on each of {ranks} "
            "processes: lower data.batch_size"
        )
    return rows


class Examples(Dataset[Any]):
    """Rows as a batch view makes them. A subclass has a length and is indexed by :class:`Draw`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Any:
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Begins an epoch of training, before its first draw and before workers copy the data set."""

    def prepare(self) -> None:
        """Does once, in the main process, work that the workers of each epoch would do anew."""

    def lengths(self) -> list[int] | None:
        """Tokens of each row, of its longest text where it has several; None where rows are not grouped by length."""
        return None

    def budget(self, tokens: int) -> TokenBudget | None:
        """Returns a budget for batches of so many padded tokens; None where all rows cost the same."""
        return None

    def origins(self) -> Sequence[Any]:
        """Returns what each row was made of; predictions depend on it."""
        return [self[Draw(0, row)] for row in range(len(self))]


class Remaining(Examples):
    """The rows of a data set from one row on.

    Args:
        examples: The data set.
        first: Number of the first row.
    """

    def __init__(self, examples: Examples, first: int) -> None:
        self._examples, self._first = examples, first

    def __len__(self) -> int:
        return len(self._examples) - self._first

    def __getitem__(self, draw: Draw) -> Any:
        """Returns a row, counted from the first of the rest."""
        return self._examples[Draw(draw.epoch, draw.row + self._first)]


class RepeatBatchSampler(Sampler[list[Draw]]):
    """Yields each batch ``repeats`` times; every rank gets its slice of the same global batch.

    The order is a function of seed and epoch only, and the slices of ``W`` ranks with batch size ``B`` are the
    batch of one process with batch size ``W * B``, cut into contiguous parts.

    Args:
        rows: Number of rows.
        batch_size: Rows per rank and batch.
        seed: Seed of the order.
        repeats: How often each batch is yielded in a row.
        rank: This process.
        ranks: Number of processes.
        lengths: Length of each row, to group rows of like length.
        stages: Stage of each row: an epoch goes through stage after stage. None: all rows are of one.
        same_epochs: Whether every epoch is like the first, as ``Trainer(overfit_batches=...)`` asks for.
        budget: What batches may cost, instead of ``batch_size`` and ``lengths``; no row is dropped then.

    Raises:
        UsageError: A stage has too few rows for a single batch, or there is not one stage per row.
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
        self._current: tuple[int, list[list[int]]] | None = None  # epoch and batches that are being yielded
        self.sampler = self  # Lightning calls set_epoch on `batch_sampler.sampler`, never on the batch sampler

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count * self.repeats

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yields the batches of the epoch from number ``start`` on; ``start`` is then 0 again."""
        start, self.start = self.start, 0
        epoch = 0 if self.same_epochs else self.epoch
        self._current = epoch, self._batches(torch.Generator().manual_seed(derive_seed(self.seed, epoch)))
        for number in range(start, len(self)):
            yield self.draws(number)

    def draws(self, number: int) -> list[Draw]:
        """The rank's part of a batch of the epoch that is being yielded."""
        assert self._current is not None
        epoch, batches = self._current
        return [Draw(epoch, row) for row in share(batches[number // self.repeats], self.rank, self.ranks)]

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        """The global batches of an epoch; how many there are does not depend on the generator."""
        if self.budget is not None:
            return [
                batch for rows in self._stages for batch in budget_batches(rows, self.budget, generator, self.ranks)
            ]
        size = self.batch_size * self.ranks
        return [batch for rows in self._stages for batch in shuffled_batches(rows, size, generator, self.lengths)]


class ResumableLoader(DataLoader[Any]):
    """A loader whose position goes into checkpoints, with any number of workers.

    Args:
        dataset: Rows, indexed by :class:`Draw`.
        sampler: Which draws make which batch.
        collate: Makes a batch of a list of items.
        position: Tells (epoch, batches finished in it). It is asked when a checkpoint is saved: batches that a
            worker prepared ahead do not count.
        workers: Number of worker processes.
        start_epoch: Told an epoch's number before its first draw and before its workers, which copy the data set, are
            started.
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
        """One batch, made in the main process, of all rows in those batches of the current epoch."""
        rows: Any = self.dataset
        assert self.collate_fn is not None
        return self.collate_fn([rows[draw] for number in numbers for draw in self.batch_sampler.draws(number)])

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and the number of batches finished in it."""
        epoch, done = self._position()
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start behind the finished batches."""
        self.batch_sampler.set_epoch(state["epoch"])  # at an epoch's end this is the next, which workers draw ahead
        self.batch_sampler.start = state["done"]


class OrderedBatches:
    """All rows in order, for evaluation. Every row is in exactly one batch of one rank.

    Args:
        dataset: Rows, indexed by :class:`Draw`.
        batch_size: Rows per rank and batch.
        collate: Makes a batch of a list of items.
        rank: This process.
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
