import pytest
import torch

from moslim.evaluation.classifier_measures import complete_weights, pairwise_accuracy
from moslim.evaluation.classifier_records import ScoredComparisons
from moslim.utils.files import plain
from tests.helpers.scored_rows import PREFERENCES

PAIRS = ScoredComparisons(
    score_margins=torch.tensor([[0.5, -1.0], [0.0, 2.0], [-0.5, 0.25], [0.25, 1.0]], dtype=torch.float64),
    comparison_mask=torch.tensor([[True, True], [True, True], [True, False], [False, False]]),
    question=torch.tensor([1, 1, 2, 2]),
    subsets=["en", "de", "en", None],
)


def test_by_hand() -> None:
    found = plain(pairwise_accuracy(PAIRS, PREFERENCES))
    assert found["n_pairs"] == 4
    assert {name: (p["accuracy"], p["n_pairs"]) for name, p in found["dimensions"].items()} == {
        "two": (0.5, 3),  # right, tie, wrong
        "three": (0.5, 2),  # wrong, right
    }
    # sums -0.5, 2.0, -0.5; the last comparison speaks about nothing
    assert found["weighted"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["weighted"]["n_pairs"] == 3
    assert found["weighted"]["weights"] == {"two": 1, "three": 1}
    # question 1 has a half and question 2 nothing right: resamples hold 0, both, or only the first
    assert found["dimensions"]["two"]["interval"] == [0, 0.75]
    assert found["dimensions"]["three"]["interval"] == [None, None]  # one question


def test_parts_of_the_data_by_hand() -> None:
    found = plain(pairwise_accuracy(PAIRS, PREFERENCES))["subsets"]
    assert {name: part["n_pairs"] for name, part in found.items()} == {"de": 1, "en": 2}
    assert found["de"]["dimensions"]["three"]["accuracy"] == 1 and found["de"]["weighted"]["accuracy"] == 1
    assert found["en"]["dimensions"]["two"]["accuracy"] == 0.5 and found["en"]["weighted"]["accuracy"] == 0


def test_weights_change_the_sum() -> None:
    found = pairwise_accuracy(PAIRS, PREFERENCES, {"two": 3})["weighted"]
    assert found["accuracy"] == 0.5 and found["n_pairs"] == 3
    against = pairwise_accuracy(PAIRS, PREFERENCES, {"three": -1})["weighted"]  # a dimension that people dislike
    assert against["accuracy"] == 0.5 and against["n_pairs"] == 2


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="pair_weights names four; there are the dimensions two, three"):
        complete_weights(PREFERENCES, {"four": 1.0})
    with pytest.raises(ValueError, match="all 0"):
        complete_weights(PREFERENCES, {"two": 0.0})
