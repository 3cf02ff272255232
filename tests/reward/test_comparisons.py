import math

import pytest
import torch

from moslim.preferences import PreferenceSet
from moslim.reward.losses import BradleyTerry, PairMetrics

SCORE_MARGINS = torch.tensor([[1.0, -2.0], [0.5, 3.0], [4.0, 4.0]])
MASK = torch.tensor([[True, True], [True, False], [False, False]])
MARGINS = torch.tensor([0.5, 0.0, 1.0])


def cost(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def test_loss_by_hand() -> None:
    """A mean over the dimensions of each comparison, then over those that speak about any."""
    expected = ((cost(2 * 0.5) + cost(2 * -2.5)) / 2 + cost(2 * 0.5)) / 2
    assert BradleyTerry(scale=2.0)(SCORE_MARGINS, MASK, MARGINS).item() == pytest.approx(expected)


def test_margins_count_as_much_as_they_are_scaled() -> None:
    half, none = (BradleyTerry(margin_scale=scale)(SCORE_MARGINS, MASK, MARGINS) for scale in (0.5, 0.0))
    assert torch.equal(half, BradleyTerry()(SCORE_MARGINS, MASK, MARGINS / 2))
    assert torch.equal(none, BradleyTerry()(SCORE_MARGINS, MASK, torch.zeros(3)))


def test_count_of_all_processes_replaces_that_of_the_batch() -> None:
    loss = BradleyTerry()
    half = loss(SCORE_MARGINS, MASK, MARGINS, count=torch.tensor(4.0))
    assert half.item() == pytest.approx(loss(SCORE_MARGINS, MASK, MARGINS).item() / 2)


def test_gradient_widens_the_gaps_that_are_compared() -> None:
    score_margins = SCORE_MARGINS.clone().requires_grad_()
    BradleyTerry()(score_margins, MASK, MARGINS).backward()
    assert torch.equal(score_margins.grad < 0, MASK) and (score_margins.grad[~MASK] == 0).all()


def test_nothing_to_compare_costs_nothing() -> None:
    nothing = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool), torch.zeros(0)
    assert BradleyTerry()(*nothing).item() == 0
    assert BradleyTerry()(SCORE_MARGINS, torch.zeros_like(MASK), MARGINS).item() == 0


def test_accuracy_by_hand_in_one_piece_and_in_two() -> None:
    preferences = PreferenceSet({"a": ["0", "1"], "b": ["0", "1"]})
    metrics = PairMetrics(preferences)
    metrics.update(SCORE_MARGINS[:1], MASK[:1])
    metrics.update(SCORE_MARGINS[1:], MASK[1:])
    found = {key: value.item() for key, value in metrics.compute().items()}
    assert found == {"pairs/accuracy": pytest.approx(2 / 3), "pairs/a/accuracy": 1.0, "pairs/b/accuracy": 0.0}
    metrics.reset()
    metrics.update(torch.zeros(1, 2), torch.tensor([[True, False]]))
    assert {key: value.item() for key, value in metrics.compute().items()} == {
        "pairs/accuracy": 0.5,
        "pairs/a/accuracy": 0.5,
    }


def test_no_comparisons_have_no_accuracy() -> None:
    metrics = PairMetrics(PreferenceSet({"a": ["0", "1"]}))
    metrics.update(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.bool))
    assert metrics.compute() == {}
