"""Comparisons made of raters' votes."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from moslim.data.sources.combined import ComparisonsFromRatings
from moslim.data.sources.table import Table
from moslim.data.sources.workbench import Workbench
from moslim.data.types import Example, RowKind, Source, Split
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import LEVELS, gold_levels

PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"], "heat": ["cold", "warm"]})


def table(folder: Path, *records: dict) -> Table:
    file = folder / "rated.jsonl"
    file.write_text("".join(json.dumps({"heat": None, **record}) + "\n" for record in records))
    return Table(str(file), rejected="other" if any("other" in record for record in records) else None)


def compared(source: Source, split: Split = Split.TRAIN, seed: int = 0) -> list[Example]:
    return ComparisonsFromRatings(source, "size").rows(RowKind.LABELLED, split, PREFERENCES, seed)


def test_the_margin_is_small_where_raters_disagree(tmp_path: Path) -> None:
    clear, disputed, low, other = compared(
        table(
            tmp_path,
            {"question": "a", "answer": "clear", "size": [2, 2, 2]},
            {"question": "A ", "answer": "disputed", "size": [2, 0, 0]},
            {"question": "a", "answer": "low", "size": 0, "heat": 1},
            {"question": "b", "answer": "alone", "size": 2},
        )
    )
    assert disputed.rejected == "low" and disputed.margin == pytest.approx(2 / 3)
    assert (clear.rejected, clear.margin) in (("low", 2.0), ("disputed", pytest.approx(4 / 3)))
    assert clear.comparison_dimensions == disputed.comparison_dimensions == ("size",)
    assert clear.levels == {"size": 2} and clear.votes == {"size": (2, 2, 2)}
    assert low.rejected is other.rejected is None and low.levels == {"size": 0, "heat": 1}


def test_nothing_is_compared_with_itself_or_without_a_rating_or_twice(tmp_path: Path) -> None:
    same, again, unrated, given = compared(
        table(
            tmp_path,
            {"question": "a", "answer": "x", "size": 1},
            {"question": "a", "answer": "x", "size": 0},
            {"question": "a", "answer": "y", "size": None},
            {"question": "a", "answer": "z", "size": 2, "other": "theirs"},
        )
    )
    assert same.rejected is again.rejected is unrated.rejected is None
    assert (given.rejected, given.comparison_dimensions, given.margin) == ("theirs", (), 0.0)


def test_the_workbench_s_raters(tmp_path: Path) -> None:
    """Rivals follow from the seed, stand in the same split, and mostly differ as the gold scorer says."""
    preferences = PreferenceSet(LEVELS)
    source = ComparisonsFromRatings(Workbench(reward_rows=300, bare_rows=0, raters=3), "warmth")
    rows = source.rows(RowKind.LABELLED, Split.TRAIN, preferences, 0)
    assert rows == source.rows(RowKind.LABELLED, Split.TRAIN, preferences, 0)
    assert [row.rejected for row in rows] != [
        row.rejected for row in source.rows(RowKind.LABELLED, Split.TRAIN, preferences, 1)
    ]
    answers = defaultdict(set)
    for row in rows:
        answers[row.question].add(row.answer)
    pairs = [row for row in rows if row.rejected is not None]
    assert len(pairs) > 200 and all(row.rejected in answers[row.question] for row in pairs)
    differences = [
        gold_levels(row.question, row.answer or "")["warmth"] - gold_levels(row.question, row.rejected or "")["warmth"]
        for row in pairs
    ]
    assert sum(difference > 0 for difference in differences) > 0.6 * len(pairs)
    assert any(0 < row.margin < 1 for row in pairs) and max(row.margin for row in pairs) > 2
    clear, unclear = (
        [g for g, row in zip(differences, pairs, strict=True) if (row.margin > 1) == side] for side in (True, False)
    )
    assert sum(clear) / len(clear) > sum(unclear) / len(unclear) + 1


def test_other_views_and_an_unknown_dimension(tmp_path: Path) -> None:
    source = table(tmp_path, {"question": "a", "answer": "x", "size": 1}, {"question": "a", "answer": "y", "size": 0})
    rivals = ComparisonsFromRatings(source, "size")
    for kind in (RowKind.PROMPTS, RowKind.TEXTS):
        expected = source.rows(kind, Split.TRAIN, PREFERENCES, 0)
        assert rivals.rows(kind, Split.TRAIN, PREFERENCES, 0) == expected
    with pytest.raises(UsageError, match="no dimension 'tone'; there are: size, heat"):
        ComparisonsFromRatings(source, "tone").rows(RowKind.LABELLED, Split.TRAIN, PREFERENCES, 0)
