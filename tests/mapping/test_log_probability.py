import math

import pytest
import torch

from moslim.mapping import LogProbability

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1])
PROBS = torch.tensor([[[0.25, 0.75], [0.5, 0.5]], [[1.0, 0.0], [0.001, 0.999]], [[0.5, 0.5], [1.0, 0.0]]])


def test_table() -> None:
    targets = torch.tensor([[1, 0], [1, 0], [-1, -1]])
    reward = LogProbability(floor=-3.0)(PROBS, targets, GROUPS)
    expected = torch.tensor([[math.log(0.75), math.log(0.5)], [-3.0, -3.0], [NAN, NAN]])
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total, torch.tensor([math.log(0.375) / 2, -3.0, 0.0]))


def test_a_hit_is_worth_nothing_and_the_floor_is_where_it_was_set() -> None:
    targets = torch.tensor([[-1, 0], [0, 0], [-1, 0]])
    reward = LogProbability(floor=-10.0)(PROBS, targets, GROUPS).per_dimension
    assert reward[1].tolist() == [0.0, pytest.approx(math.log(0.001))]
    with pytest.raises(ValueError, match="negative"):
        LogProbability(floor=0.5)
