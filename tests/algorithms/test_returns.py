import pytest
import torch

from moslim.algorithms.functional import discounted_sums, generalized_advantages

REWARDS = torch.tensor([[1.0, 0.0, 4.0], [2.0, 0.0, 0.0]])
VALUES = torch.tensor([[2.0, 1.0, 3.0], [0.5, 9.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_sums_of_what_follows():
    assert discounted_sums(REWARDS, 1.0).tolist() == [[5.0, 4.0, 4.0], [2.0, 0.0, 0.0]]
    assert discounted_sums(REWARDS, 0.5).tolist() == [[2.0, 2.0, 4.0], [2.0, 0.0, 0.0]]


def test_generalized_advantages_by_hand():
    # Surprises: 1 + 0.5 - 2, 0 + 1.5 - 1, 4 - 3; the second answer ends after its first token.
    found = generalized_advantages(REWARDS, VALUES, MASK, gamma=0.5, lam=0.5)
    assert found.tolist() == [[-0.5 + 0.25 * 0.75, 0.5 + 0.25 * 1.0, 1.0], [1.5, 0.0, 0.0]]


@pytest.mark.parametrize("values", [VALUES, torch.zeros_like(VALUES)])
def test_the_two_ends_of_lambda(values):
    to_go = discounted_sums(REWARDS, 1.0)
    found = generalized_advantages(REWARDS, values, MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(found, (to_go - values) * MASK)
    following = torch.tensor([[values[0, 1], values[0, 2], 0.0], [0.0, 0.0, 0.0]])
    found = generalized_advantages(REWARDS, values, MASK, gamma=1.0, lam=0.0)
    torch.testing.assert_close(found, (REWARDS + following - values) * MASK)


def test_padding_changes_nothing():
    longer = [torch.cat([x, x[:, :1] * 0], dim=1) for x in (REWARDS, VALUES, MASK)]
    found = generalized_advantages(*longer, gamma=0.9, lam=0.9)
    torch.testing.assert_close(found[:, :3], generalized_advantages(REWARDS, VALUES, MASK, 0.9, 0.9))
    assert (found[:, 3] == 0).all()
