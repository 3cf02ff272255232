import pytest

from moslim.evaluation.classifier_measures import head_correlation, length_dependence
from moslim.evaluation.classifier_records import ScoredRows
from moslim.utils.files import plain

NAMES = ("two", "three")


def test_buckets_are_quartiles_of_length(rows) -> None:
    levels = [[1, i % 3] for i in range(8)]
    predicted = [[int(i < 4), i % 3] for i in range(8)]
    found = length_dependence(rows(levels, predicted, length=[10, 20, 30, 40, 50, 60, 70, 80]), NAMES)
    assert [(b["from"], b["to"], b["n_rows"]) for b in found["buckets"]] == [
        (10, 20, 2),
        (30, 40, 2),
        (50, 60, 2),
        (70, 80, 2),
    ]
    assert [b["accuracy"]["two"] for b in found["buckets"]] == [1, 1, 0, 0]
    assert [b["accuracy"]["three"] for b in found["buckets"]] == [1, 1, 1, 1]


def test_equal_lengths_make_one_bucket(rows) -> None:
    (bucket,) = length_dependence(rows([[0, 0], [-1, 1]], [[0, 0], [0, 0]], length=[5, 5]), NAMES)["buckets"]
    assert plain(bucket) == {"from": 5, "to": 5, "n_rows": 2, "accuracy": {"two": 1.0, "three": 0.5}}


def test_a_head_that_follows_length_stands_out(rows) -> None:
    scored = rows([[0, 0], [0, 2], [0, 0]], [[0, 0], [0, 1], [0, 2]], length=[1, 2, 3])
    found = length_dependence(scored, NAMES)["spearman"]
    assert found["three"]["expected"] == pytest.approx(1)
    assert found["three"]["label"] == 0  # ranks 1.5 3 1.5


def test_heads_and_labels_correlate_over_the_same_rows(rows) -> None:
    levels = [[0, 0], [0, 2], [1, 0], [1, 2], [-1, 1]]
    predicted = [[0, 0], [0, 0], [1, 2], [1, 2], [0, 2]]  # both heads see the first dimension
    found = plain(head_correlation(rows(levels, predicted), NAMES))
    assert found == {
        "names": ["two", "three"],
        "expected": [[1, 1], [1, 1]],
        "label": [[1, 0], [0, 1]],
        "excess": 1,
    }


def test_nothing_labelled_gives_nothing(six: ScoredRows) -> None:
    none = six.select(six.length > 100)
    assert plain(length_dependence(none, NAMES)) == {
        "unit": "characters",
        "buckets": [],
        "spearman": {name: {"expected": None, "label": None} for name in NAMES},
    }
    assert plain(head_correlation(none, NAMES))["excess"] is None
