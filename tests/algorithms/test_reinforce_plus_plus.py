import pytest
import torch

from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from tests.helpers.optimizer_tables import scores

MASK = torch.tensor([[[True, True], [True, False]]])


def given(kl=0.0):
    """Scores 1 and 4; the second answer has one token only."""
    found = scores([[1.0, 4.0]], kl=kl)
    found.mask = MASK
    return found


def test_returns_to_go_are_whitened_over_all_tokens():
    # Returns 1, 1, 4: mean 2, variance (1 + 1 + 4) / 2.
    found = ReinforcePlusPlus(std_floor=0.0).advantages(given())
    torch.testing.assert_close(found, torch.tensor([[[-1.0, -1.0], [2.0, 0.0]]]) / 3**0.5)
    found = ReinforcePlusPlus(std_floor=1.0).advantages(given())
    torch.testing.assert_close(found, torch.tensor([[[-1.0, -1.0], [2.0, 0.0]]]) / 2)


def test_a_token_answers_for_the_kl_from_itself_on():
    # KL of 2 and -4 on the first tokens: returns 1 - 1, 1, 4 + 2; mean 7/3.
    found = ReinforcePlusPlus(kl_coef=0.5, std_floor=0.0).advantages(given(kl=[[2.0, -4.0]]))
    centred = torch.tensor([[[0.0, 1.0], [6.0, 0.0]]]) - 7 / 3
    variance = (49 / 9 + 16 / 9 + 121 / 9) / 2
    torch.testing.assert_close(found, centred * MASK / variance**0.5)


def test_the_baseline_form_compares_answers_to_a_prompt_first():
    two = scores([[1.0, 3.0], [10.0, 14.0]])
    found = ReinforcePlusPlus(baseline=True, std_floor=0.0, kl_coef=0.0).advantages(two)
    # Each token of the answers gets -1, 1, -2, 2; eight tokens of mean 0, variance 20 / 7.
    expected = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]])[..., None].expand(2, 2, 2) / (20 / 7) ** 0.5
    torch.testing.assert_close(found, expected)


def test_discounting():
    found = ReinforcePlusPlus(gamma=0.5, std_floor=0.0).advantages(given())  # returns 0.5, 1, 4
    centred = torch.tensor([[[0.5, 1.0], [4.0, 0.0]]]) - 5.5 / 3
    variance = (centred * MASK).square().sum() / 2
    torch.testing.assert_close(found, centred * MASK / variance.sqrt())


def test_one_answer_per_prompt_will_do_without_a_baseline():
    found = ReinforcePlusPlus(std_floor=0.0).advantages(scores([[1.0], [3.0]]))
    torch.testing.assert_close(found, torch.tensor([[[-1.0] * 2], [[1.0] * 2]]) / (4 / 3) ** 0.5)


@pytest.mark.parametrize("baseline", [False, True])
def test_dimensions_normalised_first(baseline):
    two = scores([[9.0, 9.0]], per_dimension=[[[0.0, 4.0], [2.0, 4.0]]])
    options = {"aggregation": "normalize_then_sum", "std_floor": 0.0, "baseline": baseline}
    found = ReinforcePlusPlus(**options).advantages(two)
    assert (found[0, 0] < 0).all() and (found[0, 1] > 0).all()
