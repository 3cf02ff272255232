import math
from functools import partial

import pytest
import torch

from moslim.algorithms.functional import normalize_then_sum
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.mapping.base import weighted_mean
from tests.helpers.optimizer_tables import scores

NAN = math.nan
ALL = [RLOO, GRPO, ReinforcePlusPlus, PPO, OnlineDPO]


def test_normalize_then_sum_by_hand():
    # Dimension 0 varies by 1 around 2, dimension 1 by 3 around 5; both are active: divided by sqrt(2).
    rewards = torch.tensor([[[1.0, 8.0], [3.0, 2.0]]])
    found = normalize_then_sum(rewards, std_floor=0.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0]]))
    found = normalize_then_sum(rewards, std_floor=4.0)  # scales sqrt(1 + 16) and sqrt(9 + 16)
    first = (-1 / math.sqrt(17) + 3 / 5) / math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[first, -first]]))


def test_inactive_dimensions_do_not_count():
    rewards = torch.tensor([[[1.0, NAN], [3.0, NAN]], [[NAN, 6.0], [NAN, 0.0]], [[NAN, NAN], [NAN, NAN]]])
    found = normalize_then_sum(rewards, std_floor=0.0)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]))


def test_a_cell_without_a_value_does_not_count():
    """A reward that applies to some of a group's answers only: the moments are the others'."""
    rewards = torch.tensor([[[1.0, 5.0], [3.0, NAN], [2.0, 1.0]]])
    first = torch.tensor([-1.0, 1.0, 0.0]) / math.sqrt(2 / 3)
    second = torch.tensor([1.0, 0.0, -1.0])
    expected = (first + second) / torch.tensor([2.0, 1.0, 2.0]).sqrt()
    torch.testing.assert_close(normalize_then_sum(rewards, std_floor=0.0), expected[None])


def test_weights_per_answer_and_dimension():
    rewards = torch.tensor([[[0.0, 2.0], [2.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]])
    weights = torch.tensor([[[3.0, 4.0], [3.0, 4.0]], [[1.0, 0.0], [1.0, 0.0]]])
    found = normalize_then_sum(rewards, 0.0, weights)
    torch.testing.assert_close(found, torch.tensor([[0.2, -0.2], [-1.0, 1.0]]))
    assert torch.equal(normalize_then_sum(rewards, 0.0, torch.ones_like(weights)), normalize_then_sum(rewards, 0.0))
    given = scores([[0.0, 0.0]] * 2, per_dimension=rewards.tolist(), weights=weights)
    torch.testing.assert_close(RLOO(aggregation="normalize_then_sum", std_floor=0.0).scores(given), found)


def test_one_answer_has_no_group_to_be_normalised_in():
    for kind in ALL:
        with pytest.raises(ValueError, match="num_generations to 2 or more"):
            kind(aggregation="normalize_then_sum").scores(scores([[1.0]]))


def test_a_satisfied_dimension_is_not_blown_up():
    noise = torch.tensor([[[0.0, 0.701], [1.0, 0.699]]])
    assert normalize_then_sum(noise, std_floor=0.0).abs().max() < 1e-3  # the noise cancels the reward
    torch.testing.assert_close(
        normalize_then_sum(noise, std_floor=0.1),
        torch.tensor([[-1.0, 1.0]]) * (0.5 / math.sqrt(0.26) - 0.001 / math.sqrt(0.010001)) / math.sqrt(2),
    )


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_equal_answers_score_nothing(floor):
    assert normalize_then_sum(torch.full((2, 3, 2), 0.3), floor).abs().max() < 1e-6


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("num_generations", [3, 7, 16])
def test_rounding_is_not_blown_up(floor, num_generations):
    rewards = torch.linspace(-3, 3, 200)[:, None, None].expand(200, num_generations, 1)  # their mean is rounded
    assert normalize_then_sum(rewards, floor).abs().max() < 0.01


def test_infinity_stays_infinity():
    total = weighted_mean(torch.tensor([[math.inf, 1.0], [NAN, 2.0]]), torch.ones(2, 2))
    assert total.tolist() == [math.inf, 2.0]
    assert weighted_mean(torch.tensor([[math.inf, 1.0]]), torch.tensor([[0.0, 1.0]])).item() == 1
    assert not normalize_then_sum(torch.tensor([[[math.inf], [1.0]]]), 0.1).isfinite().all()


@pytest.mark.parametrize("kind", [RLOO, GRPO])
def test_score_is_reward_less_penalty_and_kl_in_the_reward_for_rloo_alone(kind):
    given = scores([[1.0, 2.0]], kl=[[4.0, -2.0]], penalty=torch.tensor([[0.0, 0.5]]))
    expected = {RLOO: [[0.0, 2.0]], GRPO: [[1.0, 1.5]]}[kind]
    assert kind(kl_coef=0.25).scores_less_kl(given).tolist() == expected


@pytest.mark.parametrize("kind", ALL)
def test_aggregation_chooses_scalar_or_dimensions(kind):
    given = scores([[7.0, 9.0]], per_dimension=[[[1.0, 0.0], [3.0, 0.0]]])
    assert kind().scores(given).tolist() == [[7.0, 9.0]]
    decoupled = kind(aggregation="normalize_then_sum", std_floor=0.0).scores(given)
    torch.testing.assert_close(decoupled, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2))


@pytest.mark.parametrize("kind", [RLOO, GRPO, ReinforcePlusPlus, PPO])
def test_a_reference_is_needed_only_for_a_kl(kind):
    assert kind(kl_coef=0.1).needs_reference and not kind(kl_coef=0.0).needs_reference


@pytest.mark.parametrize("kind", [RLOO, GRPO, OnlineDPO, partial(ReinforcePlusPlus, baseline=True)])
def test_one_answer_per_prompt_is_refused(kind):
    with pytest.raises(ValueError, match="num_generations to 2 or more"):
        kind().advantages(scores([[1.0], [2.0]]))


@pytest.mark.parametrize("kind", [RLOO, GRPO, ReinforcePlusPlus, PPO])
@pytest.mark.parametrize(
    "wrong",
    [
        "entropy_coef -0.1",
        "dual_clip 1.0",
        "kl_coef -0.1",
        "epsilon_low 0.0",
        "epsilon_low 1.0",
        "epsilon_high 0.0",
        "std_floor -0.1",
        "aggregation sum",
    ],
)
def test_wrong_options_are_named(kind, wrong):
    option, text = wrong.split()
    value = text if option == "aggregation" else float(text)
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        kind(**{option: value})


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (PPO, "gamma 1.5"),
        (PPO, "lam -0.1"),
        (PPO, "value_coef 0.0"),
        (PPO, "value_clip 0.0"),
        (ReinforcePlusPlus, "gamma -1.0"),
        (GRPO, "min_spread -0.1"),
        (OnlineDPO, "beta 0.0"),
        (OnlineDPO, "min_margin -1.0"),
        (OnlineDPO, "std_floor -1.0"),
    ],
)
def test_wrong_options_of_one_s_own_are_named(kind, wrong):
    option, text = wrong.split()
    with pytest.raises(ValueError, match=rf"policy_optimizer\.{option} is {text}"):
        kind(**{option: float(text)})


def test_clipping_is_pessimistic_on_both_sides():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    objective, clipped = RLOO(epsilon_low=0.2, epsilon_high=0.3).clipped(ratio.log(), advantage)
    torch.testing.assert_close(objective, torch.tensor([1.0, 2.0, 2.6, -1.6, -2.0, -3.0]))
    assert clipped.tolist() == [0, 0, 1, 1, 0, 0]


def test_ratios_do_not_overflow():
    objective, _ = RLOO().clipped(torch.tensor([900.0, -900.0]), torch.tensor([-1.0, 1.0]))
    assert objective.isfinite().all()
