import math

import pytest
import torch

from moslim.algorithms.online_dpo import OnlineDPO
from tests.helpers.optimizer_tables import batch, scores

ONE = torch.ones(6, 1, dtype=torch.bool)
REFERENCE = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0, -1.0])[:, None]
LOGPROBS = torch.tensor([-0.5, -1.0, -2.0, -1.0, -1.0, -1.5])[:, None]  # log odds .5, 1, -1; 0, 0, -.5
SIGNS = torch.tensor([1.0, 0.0, -1.0, -1.0, 0.0, 1.0])  # margins 0.5 + 1 and -0.5 - 0


def update(logprobs=LOGPROBS, signs=SIGNS):
    mask = ONE & (signs != 0)[:, None]
    return batch(logprobs, torch.zeros(6, 1), REFERENCE, signs, mask, num_generations=3)


def test_the_best_answer_against_the_worst():
    given = scores([[2.0, 5.0, 3.0, 2.5], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.2, 0.1]])
    assert OnlineDPO().advantages(given).tolist() == [[-1, 1, 0, 0], [0, 0, 0, 0], [-1, 0, 1, 0]]
    assert OnlineDPO().used(given).tolist() == [[True, True, False, False], [False] * 4, [True, False, True, False]]
    assert OnlineDPO(min_margin=0.2).used(given).any(dim=1).tolist() == [True, False, False]


def test_the_penalty_counts_and_the_kl_does_not():
    given = scores([[2.0, 1.5]], kl=[[9.0, 0.0]], penalty=torch.tensor([[0.0, 0.0]]))
    assert OnlineDPO().advantages(given).tolist() == [[1, -1]]
    cut = scores([[2.0, 1.5]], penalty=torch.tensor([[1.0, 0.0]]))
    assert OnlineDPO().advantages(cut).tolist() == [[-1, 1]]


def test_sigmoid_loss_by_hand():
    found = OnlineDPO(beta=0.5).loss(update())
    expected = (math.log(1 + math.exp(-0.75)) + math.log(1 + math.exp(0.25))) / 2
    assert found.loss.item() == pytest.approx(expected)
    assert found.metrics["accuracy"] == 0.5 and found.metrics["pairs"] == 1
    assert found.metrics["margin"].item() == pytest.approx(0.5 * (1.5 - 0.5) / 2)


def test_ipo_loss_by_hand():
    found = OnlineDPO(beta=0.5, loss_type="ipo").loss(update())
    assert found.loss.item() == pytest.approx(((1.5 - 1) ** 2 + (-0.5 - 1) ** 2) / 2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_prompts_without_a_pair_do_not_count(loss_type):
    signs = SIGNS * torch.tensor([1.0, 1, 1, 0, 0, 0])
    logprobs = LOGPROBS.clone().requires_grad_()
    found = OnlineDPO(beta=0.5, loss_type=loss_type).loss(update(logprobs, signs))
    alone = batch(
        LOGPROBS[:3], torch.zeros(3, 1), REFERENCE[:3], SIGNS[:3], (SIGNS[:3] != 0)[:, None], num_generations=3
    )
    torch.testing.assert_close(found.loss, OnlineDPO(beta=0.5, loss_type=loss_type).loss(alone).loss)
    assert found.metrics["pairs"] == 0.5
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient[0] == -gradient[2] != 0 and (gradient[[1, 3, 4, 5]] == 0).all()


def test_without_any_pair_there_is_no_loss_but_a_gradient_of_zero():
    logprobs = LOGPROBS.clone().requires_grad_()
    found = OnlineDPO().loss(update(logprobs, 0 * SIGNS))
    assert found.loss == 0 and found.metrics.keys() == {"pairs"}
    assert (torch.autograd.grad(found.loss, logprobs)[0] == 0).all()


def test_dimensions_normalised_first():
    given = scores([[9.0, 0.0]], per_dimension=[[[0.0, 4.0], [2.0, 4.0]]])
    assert OnlineDPO().advantages(given).tolist() == [[1, -1]]
    assert OnlineDPO(aggregation="normalize_then_sum").advantages(given).tolist() == [[-1, 1]]


def test_a_reference_is_needed_always():
    assert OnlineDPO().needs_reference
    with pytest.raises(ValueError, match="reference"):
        OnlineDPO().loss(batch(LOGPROBS, torch.zeros(6, 1), None, SIGNS, ONE, num_generations=3))


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match="loss_type is 'hinge'"):
        OnlineDPO(loss_type="hinge")
