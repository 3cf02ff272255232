import math

import pytest
import torch

from moslim.mapping import Tchebycheff
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1])
PREFERENCES = PreferenceSet({"two": ["a", "b"], "five": ["a", "b", "c", "d", "e"]})
PROBS = torch.tensor(
    [
        [[0.25, 0.75, 0, 0, 0], [0.5, 0, 0, 0, 0.5]],
        [[1.0, 0.0, 0, 0, 0], [0, 0, 1.0, 0, 0]],
        [[0.5, 0.5, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]],
    ]
)
TARGETS = torch.tensor([[1, 2], [-1, 4], [-1, -1]])
# distances on a scale of 0 to 1: two = .25, five = .5 .5


def bound(**options: object) -> Tchebycheff:
    mapping = Tchebycheff(**options)  # type: ignore[arg-type]
    mapping.bind(PREFERENCES)
    return mapping


def test_the_worst_dimension_counts() -> None:
    reward = bound(smoothing=0.0)(PROBS, TARGETS, GROUPS)
    expected = torch.tensor([[-0.25, -0.5], [NAN, -0.5], [NAN, NAN]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total, torch.tensor([-0.5, -0.5, 0.0]))


def test_weights_decide_which_is_the_worst() -> None:
    reward = bound(smoothing=0.0, weights={"two": 3.0})(PROBS, TARGETS, GROUPS)
    assert reward.per_dimension[0].tolist() == [-0.75, -0.5]
    torch.testing.assert_close(reward.total, torch.tensor([-0.75, -0.5, 0.0]))


def test_smoothing_lies_between_maximum_and_mean() -> None:
    smooth = bound(smoothing=0.5)(PROBS, TARGETS, GROUPS).total
    assert smooth[0].item() == pytest.approx(-0.5 * math.log((math.exp(0.5) + math.exp(1.0)) / 2))
    assert smooth[1:].tolist() == [pytest.approx(-0.5), 0.0]  # alone, a dimension is itself
    for smoothing, limit in ((0.001, -0.5), (1000.0, -0.375)):
        assert bound(smoothing=smoothing)(PROBS, TARGETS, GROUPS).total[0].item() == pytest.approx(limit, abs=1e-3)


def test_a_fulfilled_request_is_worth_nothing_whatever_it_names() -> None:
    hit = bound()(PROBS[1:2], torch.tensor([[0, 2]]), GROUPS[:1])
    assert hit.total.item() == pytest.approx(0.0, abs=1e-6)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UsageError, match="no dimension 'six'"):
        bound(weights={"six": 1.0})
    with pytest.raises(ValueError, match="weight of 'two' is -1"):
        Tchebycheff(weights={"two": -1.0})
    with pytest.raises(ValueError, match="smoothing"):
        Tchebycheff(smoothing=-0.1)
    assert not Tchebycheff().is_mean
