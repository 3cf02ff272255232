import pytest

from moslim.data.sources.records import Record, find, has_column, require

ROW = {"a": {"b": [{"c": 1}, {"c": None}, {}]}, "d.e": 2, "f": [3, 4], "g": None}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b.0.c", 1),
        ("a.b.*.c", [1, None, None]),
        ("a.b.3.c", None),
        ("a.x.c", None),
        ("d.e", 2),
        ("f.1", 4),
        ("f.*", [3, 4]),
        ("f.first", None),
        ("g.h", None),
        ("z", None),
    ],
)
def test_paths(path, value):
    assert find(ROW, path) == value


def test_a_column_must_be_there_but_what_is_inside_may_be_missing():
    record = Record("rows.jsonl, line 3", ROW)
    assert has_column(record, "g.h") and has_column(record, "d.e") and not has_column(record, "d")
    assert require(record, "a.x", "answer") is None
    with pytest.raises(ValueError, match=r"line 3: no field 'z.y'; there are: a, d.e, f, g. .*`answer` of the Table"):
        require(record, "z.y", "answer")
