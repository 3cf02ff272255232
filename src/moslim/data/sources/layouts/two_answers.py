"""One row with two answers, and which of them is better."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal

from moslim.data.sources.fields import require
from moslim.data.sources.layouts.base import Layout
from moslim.data.sources.records import Record
from moslim.data.sources.scale import is_missing
from moslim.errors import UsageError
from moslim.literals import as_number


@dataclass
class Verdict:
    """A column that says which of two answers is better.

    Args:
        column: A number, or a list of several raters' numbers, of which the mean counts: raters who disagree make a
            small margin, or none.
        dimensions: The dimensions that it speaks about; empty = all.
        tie: The number that calls the answers equally good: below it the first is better, above it the second.
        graded: Whether the distance from ``tie`` says how clearly, and becomes the margin.
    """

    column: str
    dimensions: list[str] = field(default_factory=list)
    tie: float = 0.0
    graded: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.tie):
            raise UsageError(f"layout.verdicts: the tie of '{self.column}' is {self.tie}: give a finite number")

    def lead(self, record: Record) -> float:
        """Returns by how much the second answer is better; negative if the first is, 0 if nothing is said."""
        value = require(record, self.column, "layout.verdicts")
        given = [one for one in (value if isinstance(value, list) else [value]) if not is_missing(one)]
        try:
            numbers = list(map(as_number, given))
        except UsageError as error:
            raise UsageError(f"{record.place}, field '{self.column}': {error}") from None
        tie = Decimal(repr(float(self.tie)))
        return float(sum(numbers, Decimal()) / len(numbers) - tie) if numbers else 0.0


class TwoAnswers(Layout):
    """Each of two answers becomes a row of its own; one that a verdict calls better has the other to compare with.

    The new rows have the columns ``answer``, ``rejected`` (null where the answer won nothing),
    ``comparison_dimensions`` (the dimensions on which it won; empty = all) and ``margin``, and what else ``first`` and
    ``second`` name. An answer that won nothing and has no column of its own is left out: nothing is said about it.

    Args:
        first: New column to field of the first answer: ``{answer: response_0, safe: is_response_0_safe}``.
        second: The same for the second answer.
        verdicts: What says which is better.
    """

    def __init__(self, first: dict[str, str], second: dict[str, str], verdicts: list[Verdict]) -> None:
        for name, columns in (("first", first), ("second", second)):
            if "answer" not in columns:
                raise UsageError(f"layout.{name} is {columns}: it must say which field is the `answer`")
        self.answers = {"first": first, "second": second}
        self.verdicts = verdicts

    def rows(self, records: list[Record]) -> list[Record]:
        """See the base class."""
        return [row for record in records for row in self._both(record)]

    def _both(self, record: Record) -> list[Record]:
        first, second = (
            {name: require(record, path, f"layout.{which}") for name, path in columns.items()}
            for which, columns in self.answers.items()
        )
        leads = [verdict.lead(record) for verdict in self.verdicts]
        rows = [
            self._row(record, "first", first, second["answer"], [-lead for lead in leads]),
            self._row(record, "second", second, first["answer"], leads),
        ]
        return [row for row in rows if row is not None]

    def _row(
        self, record: Record, which: str, columns: dict[str, object], other: object, leads: list[float]
    ) -> Record | None:
        won = [(verdict, lead) for verdict, lead in zip(self.verdicts, leads, strict=True) if lead > 0]
        if not won and len(columns) == 1:
            return None
        margins = [lead for verdict, lead in won if verdict.graded]
        about_all = any(not v.dimensions for v, _ in won)
        comparison = {
            "rejected": other if won else None,
            "comparison_dimensions": [] if about_all else [d for v, _ in won for d in v.dimensions],
            "margin": sum(margins) / len(margins) if margins else 0.0,
        }
        return Record(f"{record.place}, {which} answer", {**record.fields, **columns, **comparison})
