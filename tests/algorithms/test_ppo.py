import pytest
import torch

from moslim.algorithms.functional import CriticOptions
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.ops.lora import LoraOptions
from tests.helpers.optimizer_tables import OLD, batch, scores

VALUES = torch.tensor([[[0.5, 2.0], [3.0, 0.0]]])


def given(kl=0.0):
    """Scores 1 and 4; the second answer has one token only."""
    found = scores([[1.0, 4.0]], kl=kl, values=VALUES)
    found.mask = torch.tensor([[[True, True], [True, False]]])
    return found


def test_advantages_and_returns_by_hand():
    # Surprises: 0 + 2 - 0.5, 1 - 2, 4 - 3; with gamma 1 and lambda 0.5 the first becomes 1.5 - 0.5.
    optimizer = PPO(lam=0.5, whiten_advantages=False, kl_coef=0.0)
    surplus = torch.tensor([[[1.0, -1.0], [1.0, 0.0]]])
    torch.testing.assert_close(optimizer.advantages(given()), surplus)
    torch.testing.assert_close(optimizer.returns(given()), surplus + VALUES)
    white = PPO(lam=0.5, std_floor=0.0, kl_coef=0.0)  # mean 1/3, variance (4/9 + 16/9 + 4/9) / 2
    expected = torch.tensor([[[2 / 3, -4 / 3], [2 / 3, 0.0]]]) / (4 / 3) ** 0.5
    torch.testing.assert_close(white.advantages(given()), expected)
    torch.testing.assert_close(white.returns(given()), surplus + VALUES)  # not whitened


def test_the_kl_is_paid_token_by_token():
    optimizer = PPO(lam=1.0, whiten_advantages=False, kl_coef=0.5)
    found = optimizer.returns(given(kl=[[2.0, -4.0]]))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 1.0], [6.0, 0.0]]]))


def values_batch(values, old_logprobs, returns):
    return batch(OLD, advantages=torch.zeros(2, 3), values=values, old_values=old_logprobs, returns=returns)


def test_value_loss_by_hand():
    old_logprobs = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    values = torch.tensor([[0.1, 0.5, -0.5], [1.0, 7.0, 7.0]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    # Squared errors .81, .25, 2.25, 4; with the step clipped to 0.2: .81, .64, 1.44, 4.
    loss, clipped = PPO(value_clip=0.2).value_loss(values_batch(values, old_logprobs, returns))
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.25 + 4.0) / 4) and clipped == 0.25
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([[-0.9, 0.0, -1.5], [-2.0, 0.0, 0.0]]) / 4)
    loss, clipped = PPO(value_clip=None).value_loss(values_batch(values, old_logprobs, returns))
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.25 + 2.25 + 4.0) / 4) and clipped == 0


def test_the_loss_is_that_of_the_policy_and_a_part_of_the_critic_s():
    old_logprobs, values, returns = torch.zeros(2, 3), torch.full((2, 3), 0.1), torch.ones(2, 3)
    advantages = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    found = PPO(value_coef=0.5).loss(
        batch(OLD, advantages=advantages, values=values, old_values=old_logprobs, returns=returns)
    )
    assert found.loss.item() == pytest.approx(-10 / 4 + 0.5 * 0.5 * 0.81)
    assert found.metrics["value_loss"].item() == pytest.approx(0.5 * 0.81)
    assert found.metrics.keys() == {"clip_fraction", "value_loss", "value_clip_fraction"}


def test_a_critic_is_asked_for():
    lora = LoraOptions(rank=2)
    assert PPO().critic == CriticOptions(None) and PPO(critic_lora=lora).critic == CriticOptions(lora)
    assert RLOO().critic is None


def test_without_a_critic_s_values_there_is_an_error():
    with pytest.raises(ValueError, match="needs a critic's values"):
        PPO().advantages(scores([[1.0, 4.0]]))
    with pytest.raises(ValueError, match="values and returns"):
        PPO().loss(batch(OLD, advantages=torch.zeros(2, 3)))
