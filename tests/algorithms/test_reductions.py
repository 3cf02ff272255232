import pytest
import torch

from moslim.algorithms.functional import moments, reduce_tokens, whiten
from tests.helpers.optimizer_tables import MASK, REDUCTIONS


@pytest.mark.parametrize(
    ("loss_agg_mode", "expected"),
    [("grpo", (2.0 + 9.0) / 2), ("token_mean", 15 / 4), ("constant", (6 / 5 + 9 / 5) / 2)],
)
def test_the_three_reductions(loss_agg_mode, expected):
    values = torch.tensor([[1.0, 2.0, 3.0], [9.0, 100.0, 100.0]])
    assert reduce_tokens(values, MASK, loss_agg_mode, 5).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss_agg_mode", REDUCTIONS)
def test_an_answer_with_an_empty_mask_does_not_count(loss_agg_mode):
    values, mask = torch.tensor([[1.0, 2.0], [7.0, 7.0]]), torch.tensor([[True, True], [False, False]])
    assert reduce_tokens(values, mask, loss_agg_mode, 5) == reduce_tokens(values[:1], mask[:1], loss_agg_mode, 5)
    assert reduce_tokens(values, mask & False, loss_agg_mode, 5) == 0


@pytest.mark.parametrize("loss_agg_mode", REDUCTIONS)
def test_parts_of_a_step_average_to_the_whole(loss_agg_mode):
    values = torch.arange(12.0).reshape(4, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    cut = [slice(0, 1), slice(1, 4)]
    parts = [reduce_tokens(values[part], mask[part], loss_agg_mode, 5, mask, 2) for part in cut]
    torch.testing.assert_close(sum(parts) / 2, reduce_tokens(values, mask, loss_agg_mode, 5))


VALUES = torch.tensor([[1.0, 2.0, 6.0], [7.0, 99.0, 99.0]])


def test_moments_by_hand():
    mean, variance = moments(VALUES, MASK)  # 1, 2, 6, 7: squared distances 9 + 4 + 4 + 9
    assert mean == 4 and variance.item() == pytest.approx(26 / 3)
    assert moments(torch.tensor([3.0]), torch.tensor([True]))[1] == 0


def test_whitened_values():
    expected = (VALUES - 4) * MASK
    torch.testing.assert_close(whiten(VALUES, MASK), expected / (26 / 3) ** 0.5)
    torch.testing.assert_close(whiten(VALUES, MASK, std_floor=2.0), expected / (26 / 3 + 4) ** 0.5)
    assert (whiten(torch.full((2, 3), 5.0), MASK) == 0).all()
