"""The analysis of requests for several levels, against values worked out by hand."""

import math

import pytest
import torch

from moslim.evaluation.joint_control import JointRequests, distance_from_singles, joint_control, pair_shares
from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.steerability import Records, steerability, sweeps
from moslim.evaluation.steerability_report import markdown
from moslim.preferences import PreferenceSet

NAN = math.nan
PREFERENCES = PreferenceSet({"a": ["0", "1", "2"], "b": ["0", "1", "2"], "c": ["0", "1", "2"]})
REQUESTS = [  # targets, achieved, levels by the classifier
    ([2, 1, -1], [2, 1, 0], [2, 1, 0]),
    ([2, 0, -1], [2, 1, 0], [2, 0, 0]),  # b is missed, and the classifier does not see it
    ([0, -1, 2], [0, 2, 0], [0, 2, 0]),  # c is missed by two levels
    ([1, 1, 1], [1, 1, 2], [1, 1, 2]),
    ([0, 0, 0], [0, 0, 0], [1, 0, 0]),  # met, but the classifier does not see it
    ([1, 2, -1], [1, NAN, 1], [1, 2, 1]),  # not judged on a requested dimension: left out
    ([1, -1, 2], [1, NAN, 2], [1, 2, 2]),  # not judged on another one: kept
]


def records(rows, kind):
    targets, achieved, predicted = (torch.tensor([row[i] for row in rows]) for i in range(3))
    return Records(
        question=torch.arange(len(rows)),
        sample=torch.zeros(len(rows), dtype=torch.long),
        kinds=[kind] * len(rows),
        targets=targets,
        achieved=achieved.float(),
        probs=torch.nn.functional.one_hot(predicted, 3).float(),
    )


def sweep():
    """Single requests for a level of one dimension give that level, and level 1 elsewhere; but a = 0 gives 1."""
    rows = []
    for dimension in range(3):
        for level in range(3):
            targets, achieved = [-1, -1, -1], [1.0, 1.0, 1.0]
            targets[dimension], achieved[dimension] = level, float(level)
            if (dimension, level) == (0, 0):
                achieved[0] = 1.0
            rows.append((targets, achieved, [0, 0, 0]))
    swept = records(rows, "sweep")
    swept.question[:] = 0
    return swept


@pytest.fixture
def grids():
    return sweeps(sweep(), PREFERENCES.sizes)


def test_by_number_of_dimensions(grids):
    joint = joint_control(records(REQUESTS, "seen"), grids, PREFERENCES)
    assert joint["by_count"]["2"]["n_answers"] == 4 and joint["by_count"]["3"]["n_answers"] == 2
    assert joint["by_count"]["2"]["exact"] == pytest.approx(2 / 4)
    assert joint["by_count"]["2"]["within_one"] == pytest.approx(3 / 4)
    assert joint["by_count"]["3"]["exact"] == pytest.approx(1 / 2)


def test_by_dimension(grids):
    dimensions = joint_control(records(REQUESTS, "seen"), grids, PREFERENCES)["dimensions"]
    assert {name: values["n_answers"] for name, values in dimensions.items()} == {"a": 6, "b": 4, "c": 4}
    assert dimensions["a"]["exact"] == 1 and dimensions["b"]["exact"] == pytest.approx(3 / 4)
    assert dimensions["c"]["exact"] == pytest.approx(2 / 4) and dimensions["c"]["mae"] == pytest.approx(3 / 4)
    assert dimensions["b"]["exact_if_others_met"] == pytest.approx(2 / 3)  # row 3 misses c
    assert dimensions["c"]["exact_if_others_met"] == pytest.approx(2 / 4)
    assert dimensions["a"]["single"] == pytest.approx(4 / 6)  # two of the requests are for a = 0, which singles miss
    assert dimensions["b"]["single"] == 1


def test_pairs(grids):
    joint = JointRequests.of(records(REQUESTS, "seen"))
    assert len(joint.targets) == 6
    torch.testing.assert_close(
        pair_shares(joint),
        torch.tensor([[NAN, 3 / 4, 2 / 4], [3 / 4, NAN, 1 / 2], [2 / 4, 1 / 2, NAN]], dtype=torch.float64),
        equal_nan=True,
    )


def test_distance_from_single_requests(grids):
    targets = torch.tensor([[2, 1, -1], [2, 0, -1], [0, 0, 2], [1, -1, -1]])
    # (2, 1): b is 1 after a = 2, a is 1 after b = 1: |1 - 1| and |2 - 1|
    expected = [1 / 2, (1 + 1) / 2, 1.0, NAN]
    torch.testing.assert_close(
        distance_from_singles(targets, grids), torch.tensor(expected, dtype=torch.float64), equal_nan=True
    )
    groups = joint_control(records(REQUESTS, "seen"), grids, PREFERENCES)["by_distance"]
    assert [group["n_answers"] for group in groups] == [2, 2, 2]
    assert [group["distance"] for group in groups] == sorted(group["distance"] for group in groups)


def test_errors_of_the_classifier(grids):
    classifier = joint_control(records(REQUESTS, "seen"), grids, PREFERENCES)["classifier"]
    assert classifier["exact"] == pytest.approx(3 / 6)  # rows 0, 1 and 6
    assert classifier["wrongly_met"] == pytest.approx(1 / 3)  # of rows 1, 2, 3
    assert classifier["agreement"] == pytest.approx({"a": 5 / 6, "b": 3 / 4, "c": 1.0})


def test_without_such_requests_there_is_nothing(grids):
    assert joint_control(sweep().of_kind("seen"), grids, PREFERENCES) is None


def test_the_report_shows_it():
    both = Records.concat([sweep(), records(REQUESTS, "unseen")])
    result = steerability(both, both, PREFERENCES, JudgeInfo("gold", proxy=False), {})
    assert result["joint"]["seen"] is None
    page = markdown(result)
    assert "### Where unseen combinations fail" in page and "### Where seen" not in page
    assert "| b | 0.750 | 1.000 | 0.667 | 0.250 | 0.750 |" in page
