import pytest
import torch

from moslim.reward.modeling import Pooling, pool

HIDDEN = torch.tensor([[[1.0, -9.0], [3.0, -5.0], [8.0, 7.0]], [[2.0, 4.0], [6.0, -2.0], [4.0, 1.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["first"], [[1, -9], [2, 4]]),
        (["last"], [[3, -5], [4, 1]]),
        (["mean"], [[2, -7], [4, 1]]),
        (["max"], [[3, -5], [6, 4]]),
        (["mean", "first", "max"], [[2, -7, 1, -9, 3, -5], [4, 1, 2, 4, 6, 4]]),
    ],
)
def test_padding_is_not_read_and_kinds_stand_side_by_side(kinds: list[Pooling], expected: list[list[float]]) -> None:
    assert pool(HIDDEN, MASK, kinds).tolist() == expected
