import pytest
import torch

from moslim.mapping import LinearScalarization
from moslim.preferences import PreferenceSet

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
# expected levels on a scale of 0 to 1: two = .75 0 .5, five = .5 .5 .5


def bound(**options: str) -> LinearScalarization:
    mapping = LinearScalarization(**options)
    mapping.bind(PREFERENCES)
    return mapping


def test_shares_of_what_was_asked_for() -> None:
    reward = bound()(PROBS, torch.tensor([[1, 2], [-1, 4], [-1, -1]]), GROUPS)
    # the top of "two" and the middle of "five": weights 2/3 and 1/3
    expected = torch.tensor([[0.5, 0.5 / 3], [NAN, 0.5], [NAN, NAN]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total, torch.tensor([2 / 3, 0.5, 0.0]))


def test_a_request_of_lowest_levels_has_no_weights() -> None:
    reward = bound()(PROBS, torch.tensor([[0, 0], [0, 1], [0, -1]]), GROUPS)
    torch.testing.assert_close(reward.total, torch.tensor([0.0, 0.5, 0.0]))
    assert reward.per_dimension.isnan().tolist() == [[True, True], [False, False], [True, True]]  # no reward applies


def test_directions() -> None:
    reward = bound(weights="direction")(PROBS, torch.tensor([[1, 2], [0, 1], [-1, 0]]), GROUPS)
    expected = torch.tensor([[0.375, 0.0], [0.0, -0.25 * 0.5], [NAN, -0.5]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total, torch.tensor([0.375, -0.125, -0.5]))


def test_its_scalar_is_not_the_mean() -> None:
    assert not bound().is_mean
    with pytest.raises(ValueError, match="share or direction"):
        LinearScalarization(weights="signed")  # type: ignore[arg-type]
