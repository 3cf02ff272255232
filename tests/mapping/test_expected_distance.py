import pytest
import torch

from moslim.mapping import ExpectedDistance
from moslim.preferences import PreferenceSet

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1])
# dimension 0 has two levels, dimension 1 has five
PROBS = torch.tensor(
    [
        [[0.25, 0.75, 0, 0, 0], [0.5, 0, 0, 0, 0.5]],
        [[1.0, 0.0, 0, 0, 0], [0, 0, 1.0, 0, 0]],
        [[0.5, 0.5, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]],
    ]
)
TARGETS = torch.tensor([[1, 2], [-1, 4], [-1, -1]])


def test_table() -> None:
    reward = ExpectedDistance()(PROBS, TARGETS, GROUPS)
    # a head that bets on both ends is 2 away from the middle, though its expected level is the middle
    expected = torch.tensor([[-0.25, -2.0], [NAN, -2.0], [NAN, NAN]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total, torch.tensor([-1.125, -2.0, 0.0]))


def test_normalised_table() -> None:
    mapping = ExpectedDistance(normalize=True)
    mapping.bind(PreferenceSet({"two": ["a", "b"], "five": ["a", "b", "c", "d", "e"]}))
    reward = mapping(PROBS, TARGETS, GROUPS)
    expected = torch.tensor([[-0.25, -0.5], [NAN, -0.5], [NAN, NAN]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)


def test_exact_hit_is_best_and_opposite_end_is_worst() -> None:
    probs = torch.eye(5)[:, None]
    reward = ExpectedDistance()(probs, torch.zeros(5, 1, dtype=torch.long), torch.arange(5))
    assert reward.total.tolist() == pytest.approx([0, -1, -2, -3, -4])
