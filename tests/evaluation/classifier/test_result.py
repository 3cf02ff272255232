import json

import pytest
import torch

from moslim.evaluation.classifier_records import ScoredComparisons, ScoredRows
from moslim.evaluation.classifier_report import SCHEMA, evaluate
from moslim.reward.heads import brier_score, ranked_probability_score, top_reliability
from tests.helpers.scored_rows import PREFERENCES


@pytest.fixture
def pairs() -> ScoredComparisons:
    return ScoredComparisons(torch.tensor([[1.0, -1.0]]).double(), torch.ones(1, 2).bool(), torch.tensor([9]), [None])


def test_every_part_is_there(six: ScoredRows, pairs: ScoredComparisons) -> None:
    result = evaluate(six, pairs, PREFERENCES, best_of={"accuracy": 0.5})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        *("schema", "dimensions", "mean", "baseline", "subsets", "length", "correlation", "pairs", "requests"),
        *("best_of", "calibration", "n_rows", "n_questions"),
    }
    assert (result["schema"], result["n_rows"], result["n_questions"]) == (SCHEMA, 6, 4)
    three = result["dimensions"]["three"]
    assert three["levels"] == ["a", "b", "c"] and three["n_rows"] == 6
    assert three["confusion"] == [[1, 1, 0], [0, 2, 0], [1, 0, 1]] and three["recall"] == [0.5, 1, 0.5]
    assert set(three["interval"]) == {"accuracy", "within_one", "kappa"}
    assert result["mean"]["accuracy"] == pytest.approx((3 / 5 + 4 / 6) / 2, abs=1e-6)
    assert result["mean"]["auroc"] == result["dimensions"]["two"]["auroc"]  # the other has none
    assert result["best_of"] == {"accuracy": 0.5}


def test_subsets_have_the_same_measures(six: ScoredRows, no_comparisons: ScoredComparisons) -> None:
    result = evaluate(six, no_comparisons, PREFERENCES)
    assert list(result["subsets"]) == ["de", "en"]
    english = result["subsets"]["en"]
    assert english["n_rows"] == 3 and english["dimensions"]["two"]["n_rows"] == 3
    assert english["dimensions"]["three"]["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    alone = evaluate(six.select(torch.arange(6) < 3), no_comparisons, PREFERENCES)
    assert english["mean"] == alone["mean"]
    assert result["pairs"] is None


def test_calibration_is_that_of_the_labelled_rows(six: ScoredRows, no_comparisons: ScoredComparisons) -> None:
    six.raw = six.probs.sqrt() / six.probs.sqrt().sum(-1, keepdim=True)
    found = evaluate(six, no_comparisons, PREFERENCES)["calibration"]
    probs, targets = six.probs[:, 1], six.targets[:, 1]
    assert found["three"]["ece"] == pytest.approx(top_reliability(probs, targets).error.item(), abs=1e-6)
    assert found["three"]["ece"] == pytest.approx(0.8 - 4 / 6, abs=1e-6)  # all are 0.8 sure, four of six right
    assert found["three"]["bins"] == {"confidence": [0.8], "accuracy": [pytest.approx(4 / 6, abs=1e-6)], "count": [6]}
    assert found["three"]["brier"] == pytest.approx(brier_score(probs, targets).item(), abs=1e-6)
    before = found["three"]["uncalibrated"]
    assert before["rps"] == pytest.approx(ranked_probability_score(six.raw[:, 1], targets).item(), abs=1e-6)
    # level "yes" has probability 0.2 twice, once rightly not; 0.8 three times, twice rightly; "no" mirrors it
    assert found["two"]["classwise_ece"] == pytest.approx((2 * 0.3 + 3 * (0.8 - 2 / 3)) / 5, abs=1e-6)


def test_without_temperatures_nothing_is_before(six: ScoredRows, no_comparisons: ScoredComparisons) -> None:
    found = evaluate(six, no_comparisons, PREFERENCES)["calibration"]
    assert found["two"]["uncalibrated"] is None and found["two"]["rps"] is not None


def test_the_order_of_rows_does_not_matter(six: ScoredRows, pairs: ScoredComparisons) -> None:
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    parts = [six.select(torch.arange(6) == i) for i in order.tolist()]
    assert evaluate(ScoredRows.concat(parts), pairs, PREFERENCES) == evaluate(six, pairs, PREFERENCES)


def test_nothing_labelled(six: ScoredRows, pairs: ScoredComparisons) -> None:
    result = evaluate(six.select(six.length > 100), pairs, PREFERENCES)
    assert result["n_rows"] == 0 and result["pairs"]["n_pairs"] == 1
    assert result["calibration"] == {"two": None, "three": None}
    assert all(value is None for value in result["mean"].values())
