"""Several sources as one."""

import json
from pathlib import Path

import pytest

from moslim.data.sources.combined import ConcatSource
from moslim.data.sources.table import Table
from moslim.data.types import RowKind, Split
from moslim.preferences import Preference, PreferenceSet

PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"]})


def table(folder: Path, name: str, questions: str, **options: object) -> Table:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": name, "size": 1}) + "\n" for q in questions))
    return Table(str(file), **options)


@pytest.mark.filterwarnings("ignore:.*training labels")
def test_rows_stand_one_source_after_the_other(tmp_path: Path) -> None:
    first, second = table(tmp_path, "first", "ab"), table(tmp_path, "second", "cd")
    second.held_out = lambda preference: bool(preference)  # type: ignore[method-assign]
    first.reachable = lambda preference: False  # type: ignore[method-assign]
    both = ConcatSource([first, second])
    rows = both.rows(RowKind.LABELLED, Split.TRAIN, PREFERENCES, 0)
    assert [(row.question, row.answer) for row in rows] == [
        ("a", "first"),
        ("b", "first"),
        ("c", "second"),
        ("d", "second"),
    ]
    asked = Preference({"size": 0})
    assert both.reachable(asked) and both.held_out(asked) and not both.held_out(Preference())
    with pytest.raises(ValueError, match=r"source\.sources is empty"):
        ConcatSource([])


@pytest.mark.filterwarnings("ignore:.*training labels")
def test_questions_that_another_source_trains_on_are_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    held_out = table(tmp_path, "held_out", "AACe")
    mine = table(tmp_path, "mine", "xyz", test=held_out.path)
    others = table(tmp_path, "others", "abc")
    both = ConcatSource([mine, others])
    with pytest.warns(UserWarning, match=r"^3 of 4 held-out rows ask 2 questions that another source trains on.*'a'"):
        assert len(both.rows(RowKind.LABELLED, Split.TEST, PREFERENCES, 0)) == 4
    recwarn.clear()
    both.rows(RowKind.LABELLED, Split.TRAIN, PREFERENCES, 0)
    ConcatSource([mine]).rows(RowKind.LABELLED, Split.TEST, PREFERENCES, 0)
    ConcatSource([mine, table(tmp_path, "apart", "uvw")]).rows(RowKind.LABELLED, Split.TEST, PREFERENCES, 0)
    assert not [warning for warning in recwarn if "another source" in str(warning.message)]


def test_rows_to_be_scored_are_read_one_at_a_time(tmp_path: Path) -> None:
    first, second = (table(tmp_path, name, "ab") for name in ("first", "second"))
    first.others[Split.PREDICT] = first.path
    second.others[Split.PREDICT] = str(tmp_path / "absent.jsonl")
    rows = ConcatSource([first, second]).stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, 0)
    assert [next(rows).answer, next(rows).answer] == ["first", "first"]
    with pytest.raises(FileNotFoundError, match="absent"):  # only now is the second asked
        next(rows)
