"""Answers to which no reward applies: out of every statistic, with penalty and KL only. Values by hand."""

import math
from functools import partial

import pytest
import torch

from moslim.algorithms.functional import whiten
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from tests.helpers.optimizer_tables import batch, scores

NAN = math.nan
Plain = partial(ReinforcePlusPlus, std_floor=0.0)
Critic = partial(PPO, std_floor=0.0)
MAKERS = {
    "rloo": RLOO,
    "rloo, normalised first": partial(RLOO, aggregation="normalize_then_sum"),
    "grpo": GRPO,
    "grpo, batch": partial(GRPO, scale="batch"),
    "grpo, batch, normalised first": partial(GRPO, scale="batch", aggregation="normalize_then_sum"),
    "grpo, none": partial(GRPO, scale="none"),
    "grpo, in reward": partial(GRPO, kl_in="reward", kl="k1"),
    "reinforce": ReinforcePlusPlus,
    "reinforce, baseline": partial(ReinforcePlusPlus, baseline=True),
    "ppo": PPO,
    "online dpo": OnlineDPO,
}


def given(total, kl=0.0, penalty=0.0, **more):
    """Rewards of groups; NaN where none applies. Their scalar is then 0, as a mapping gives it."""
    rewards = torch.tensor(total)
    penalty = torch.tensor(penalty)
    per_dimension = rewards[..., None].tolist()
    return scores(rewards.nan_to_num(0.0).tolist(), per_dimension, kl, penalty, **more)


def advantages(optimizer, rewards):
    """``[G, n, T]``."""
    if isinstance(optimizer, PPO):
        rewards.values = torch.full(rewards.mask.shape, 0.7)
    found = optimizer.advantages(rewards)
    return found if found.dim() == 3 else found[..., None].expand(rewards.mask.shape)


@pytest.mark.parametrize("maker", MAKERS)
def test_they_change_no_other_answer_and_stay_neutral(maker):
    """The groups of the paper's distance reward: instructed answers are below 0, the others must not look good."""
    optimizer = MAKERS[maker]()
    alone = advantages(optimizer, given([[-1.0, -2.0, -4.0], [-3.0, -1.5, -1.0]]))
    beside = advantages(optimizer, given([[-1.0, -2.0, -4.0], [NAN, NAN, NAN], [-3.0, -1.5, -1.0]]))
    torch.testing.assert_close(beside[[0, 2]], alone)
    assert beside[1].abs().max() == 0


@pytest.mark.parametrize("maker", MAKERS)
def test_beside_rewarded_answers_to_the_same_prompt_they_are_neutral_too(maker):
    optimizer = MAKERS[maker]()
    alone = advantages(optimizer, given([[-1.0, -2.0, -4.0]]))
    beside = advantages(optimizer, given([[NAN, -1.0, -2.0, NAN, -4.0]]))
    torch.testing.assert_close(beside[:, [1, 2, 4]], alone)
    assert beside[:, [0, 3]].abs().max() == 0


@pytest.mark.parametrize("maker", MAKERS)
def test_where_no_answer_of_the_batch_is_rewarded_penalties_count_as_ever(maker):
    if maker == "ppo":
        pytest.skip("its critic, which has no part in them, has one otherwise")
    nothing, zero = [[NAN, NAN, NAN]] * 2, [[0.0, 0.0, 0.0]] * 2
    cut = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    found, plain = (advantages(MAKERS[maker](), given(total, penalty=cut)) for total in (nothing, zero))
    torch.testing.assert_close(found, plain)
    assert found.abs().max() > 0


def test_rloo_compares_each_kind_with_itself():
    # Rewarded: scores 2 and 6 - 0.5 * 2 = 5. The others: -1 and -0.5 * 4 = -2, one of them cut.
    mixed = given([[2.0, NAN, 6.0, NAN]], kl=[[0.0, 0.0, 2.0, 4.0]], penalty=[[0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(RLOO(kl_coef=0.5).advantages(mixed), torch.tensor([[-3.0, 1.0, 3.0, -1.0]]))


@pytest.mark.parametrize("maker", ["rloo", "grpo", "grpo, none", "reinforce, baseline"])
def test_one_without_another_of_its_kind_has_nothing_to_be_compared_with(maker):
    found = advantages(MAKERS[maker](), given([[NAN, 1.0, 3.0]], penalty=[[1.0, 0.0, 0.0]]))
    assert found[0, 0].abs().max() == 0 and (found[0, 1] < 0).all() and (found[0, 2] > 0).all()
    lone = advantages(MAKERS[maker](), given([[NAN, 1.0, NAN]]))
    assert lone.abs().max() == 0


def test_grpo_divides_them_by_the_larger_deviation():
    optimizer = GRPO(std_floor=0.0)
    # Rewarded 0 and 4: deviation sqrt(8). The others -1 and 0: sqrt(0.5), which is smaller.
    found = optimizer.advantages(given([[0.0, 4.0, NAN, NAN]], penalty=[[0.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[-2.0, 2.0, -0.5, 0.5]]) / (8**0.5 + 1e-4))
    # Rewarded ones that are alike: the others' own, and never 1e-4.
    found = optimizer.advantages(given([[2.0, 2.0, NAN, NAN]], penalty=[[0.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, -0.5, 0.5]]) / (0.5**0.5 + 1e-4))


def test_grpo_with_batch_scale_has_the_deviation_of_the_rewarded_scores():
    optimizer = GRPO(std_floor=0.0, scale="batch")
    found = optimizer.advantages(given([[-1.0, -3.0], [NAN, NAN]]))  # without the fix 0 is the best of the batch
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [0.0, 0.0]]) / (2**0.5 + 1e-4))
    found = optimizer.advantages(given([[-1.0, -5.0], [NAN, NAN]], penalty=[[0.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, -2.0], [-0.5, 0.5]]) / (8**0.5 + 1e-4))


def test_grpo_leaves_out_equal_answers_of_one_kind():
    found = GRPO(min_spread=0.1).used(given([[1.0, 3.0, NAN, NAN], [2.0, 2.0, NAN, NAN]], penalty=[[0.0] * 4] * 2))
    assert found.tolist() == [[True, True, False, False], [False] * 4]


def test_plain_reinforce_plus_plus_by_hand():
    # Rewarded returns -1, -1, -4, -4 (two tokens each): mean -2.5, variance 9 / 3.
    # The others: 0.05 * KL on the first token, so returns -0.1, 0, 0.3, 0 of mean 0.05; their variance is smaller.
    found = Plain().advantages(given([[-1.0, -4.0], [NAN, NAN]], kl=[[0.0, 0.0], [2.0, -6.0]]))
    rewarded = torch.tensor([[1.5, 1.5], [-1.5, -1.5]]) / 3**0.5
    others = (torch.tensor([[-0.1, 0.0], [0.3, 0.0]]) - 0.05) / 3**0.5
    torch.testing.assert_close(found, torch.stack([rewarded, others]))


def test_the_baseline_form_by_hand():
    # Less their means: rewarded -2, 2 and so variance 16 / 3 over four tokens; the others -0.5 and 0.5.
    optimizer = Plain(baseline=True, kl_coef=0.0)
    found = optimizer.advantages(given([[1.0, 5.0, NAN, NAN]], penalty=[[0.0, 0.0, 1.0, 0.0]]))
    expected = torch.tensor([-2.0, 2.0, -0.5, 0.5])[None, :, None].expand(1, 4, 2) / (16 / 3) ** 0.5
    torch.testing.assert_close(found, expected)


def test_ppo_asks_no_critic_about_them():
    # Rewarded: lambda 1, so score less value: 1 - 0.5 and 4 - 0.5 at all tokens. Whitened: mean 2, variance 9 / 3.
    # The others: cut or not, whatever the critic says.
    rewards = given([[1.0, 4.0], [NAN, NAN]], penalty=[[0.0, 0.0], [1.0, 0.0]])
    rewards.values = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[7.0, -7.0], [3.0, 3.0]]])
    found = Critic(lam=1.0).advantages(rewards)
    rewarded = torch.tensor([[-1.5, -1.5], [1.5, 1.5]]) / 3**0.5
    others = torch.tensor([[-0.5, -0.5], [0.5, 0.5]]) / 3**0.5
    torch.testing.assert_close(found, torch.stack([rewarded, others]))
    plain = Critic(lam=0.5, whiten_advantages=False).advantages(rewards)[1]  # lambda stands for a critic that is asked
    assert plain.tolist() == [[-1.0, -1.0], [0.0, 0.0]]


def test_ppo_s_critic_does_not_learn_from_them():
    logprobs = torch.zeros(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    rewarded = torch.tensor([[True, True], [False, False]])
    values = torch.tensor([[1.0, 1.0], [5.0, 5.0]], requires_grad=True)
    more = {"values": values, "old_values": values.detach(), "returns": torch.zeros(2, 2)}
    update = batch(logprobs, logprobs, None, torch.zeros(2), mask, value_mask=rewarded, **more)
    loss, _ = PPO().value_loss(update)
    assert loss.item() == 0.5  # half of the mean of 1, over two tokens
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    nothing = batch(logprobs, logprobs, None, torch.zeros(2), mask, value_mask=~mask, **more)
    assert PPO().value_loss(nothing)[0].item() == 0


def test_online_dpo_makes_pairs_of_one_kind():
    optimizer = OnlineDPO()
    # Rewards -1 and -2 beside two answers that are not rewarded: those would be the best.
    assert optimizer.advantages(given([[NAN, -1.0, -2.0, NAN]])).tolist() == [[0, 1, -1, 0]]
    cut = given([[NAN, 3.0, NAN, NAN]], penalty=[[1.0, 0.0, 0.0, 0.0]])
    assert optimizer.advantages(cut).tolist() == [[-1, 0, 1, 0]]
    assert optimizer.used(given([[NAN, 3.0], [NAN, NAN]])).tolist() == [[False] * 2] * 2


def test_whitening_leaves_them_out():
    values, mask = torch.tensor([1.0, 3.0, 100.0, 102.0, 9.0]), torch.tensor([True, True, True, True, False])
    found = whiten(values, mask, rewarded=torch.tensor([True, True, False, False, False]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0]) / 2**0.5)
