"""What RLOO, GRPO, REINFORCE++ and PPO share: KL, clipping, entropy."""

import math

import pytest
import torch

from moslim.algorithms.functional import AdaptiveKL, k2, k3
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from tests.helpers.optimizer_tables import ADVANTAGES, MASK, OLD, REFERENCE, batch, scores


@pytest.mark.parametrize(
    ("place", "kl", "reason"),
    [
        ("loss", "k1", "expected gradient of zero"),
        ("reward", "k2", "no estimate"),
        ("reward", "k3", "biased gradient"),
        ("loss", "k4", "give kl_in 'reward' or 'loss'"),
        ("both", "k1", "give kl_in 'reward' or 'loss'"),
    ],
)
@pytest.mark.parametrize("kind", [RLOO, GRPO, ReinforcePlusPlus])
def test_a_kl_without_gradient_or_with_a_wrong_one_is_refused_with_the_reason(kind, place, kl, reason):
    with pytest.raises(ValueError, match=f"kl_in is '{place}', kl is '{kl}'.*{reason}"):
        kind(kl_in=place, kl=kl)


@pytest.mark.parametrize("kind", [RLOO, GRPO, ReinforcePlusPlus])
def test_the_kl_stands_in_one_place(kind):
    given = scores([[1.0, 2.0]], kl=[[4.0, -2.0]])
    in_reward, in_loss = kind(kl_coef=0.5, kl_in="reward", kl="k1"), kind(kl_coef=0.5, kl_in="loss", kl="k2")
    assert in_reward.scores_less_kl(given).tolist() == [[-1.0, 3.0]]
    assert in_loss.scores_less_kl(given).tolist() == [[1.0, 2.0]]
    assert in_reward.token_rewards(given, given.total).tolist() == [[[-2.0, 1.0], [1.0, 2.0]]]
    assert in_loss.token_rewards(given, given.total).tolist() == [[[0.0, 1.0], [0.0, 2.0]]]
    assert "kl_loss" not in in_reward.loss(batch(OLD, ref_logprobs=REFERENCE)).metrics
    assert "kl_loss" in in_loss.loss(batch(OLD, ref_logprobs=REFERENCE)).metrics


def test_the_score_falls_on_the_last_token():
    given = scores([[1.0, 2.0]], kl=0.5)
    given.mask = torch.tensor([[[True, True], [True, False]]])
    found = RLOO(kl_coef=2.0).token_rewards(given, given.total)
    assert found.tolist() == [[[-1.0, 1.0], [1.0, 0.0]]]


@pytest.mark.parametrize(("kl", "estimate"), [("k2", k2), ("k3", k3)])
def test_in_the_sequence_form_the_kl_is_summed_over_the_answer(kl, estimate):
    optimizer = RLOO(importance_sampling_level="sequence", kl_coef=0.5, kl_in="loss", kl=kl)
    found = optimizer.loss(batch(OLD, ref_logprobs=REFERENCE, advantages=0 * ADVANTAGES))
    expected = (estimate(OLD, REFERENCE) * MASK).sum(dim=1).mean()
    torch.testing.assert_close(found.metrics["kl_loss"], expected)
    torch.testing.assert_close(found.loss, 0.5 * expected)


def test_dual_clip_bounds_what_one_bad_answer_can_do():
    ratio = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.5, 4.0])
    advantage = torch.tensor([-2.0, -2.0, -2.0, -2.0, 2.0, 2.0])
    objective, clipped = RLOO(dual_clip=3.0).clipped(ratio.log(), advantage)
    torch.testing.assert_close(objective, torch.tensor([-1.6, -2.0, -4.0, -6.0, 1.0, 2.4]))
    assert clipped.tolist() == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("optimizer", [RLOO(entropy_coef=0.1), GRPO(entropy_coef=0.1, kl_coef=0.0)])
def test_entropy_is_a_mean_over_tokens(optimizer):
    entropy = torch.tensor([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]], requires_grad=True)
    assert optimizer.needs_entropy and not RLOO().needs_entropy
    found, without = optimizer.loss(batch(OLD, entropy=entropy)), optimizer.loss(batch(OLD))
    assert found.metrics["entropy_bonus"] == 3.0 and "entropy_bonus" not in without.metrics
    torch.testing.assert_close(found.loss, without.loss - 0.3)
    (gradient,) = torch.autograd.grad(found.loss, entropy)
    torch.testing.assert_close(gradient, -0.1 / 4 * MASK)


def test_token_advantages_weigh_tokens():
    per_token = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    found = ReinforcePlusPlus().loss(batch(OLD, advantages=per_token))
    assert found.loss.item() == pytest.approx(-10 / 4)


def test_a_controller_changes_the_weight():
    controller = AdaptiveKL(target=2.0, gain=0.5)
    optimizer = RLOO(kl_coef=0.1, kl_controller=controller)
    assert list(optimizer.children) == [controller] and list(RLOO().children) == []
    given = scores([[1.0, 2.0], [0.0, 0.0]], kl=[[9.0, 1.0], [1.0, 1.0]])  # 3 nats per answer on average
    before = optimizer.scores_less_kl(given)
    torch.testing.assert_close(before[0], torch.tensor([1.0 - 0.9, 2.0 - 0.1]))
    optimizer.observe(given)
    assert optimizer.beta == pytest.approx(0.1 * 1.1) and optimizer.kl_coef == 0.1
    torch.testing.assert_close(optimizer.scores_less_kl(given)[0], torch.tensor([1.0 - 0.99, 2.0 - 0.11]))
    in_loss = GRPO(kl_coef=0.1, kl_controller=controller)
    found = in_loss.loss(batch(OLD, ref_logprobs=REFERENCE, advantages=0 * ADVANTAGES))
    torch.testing.assert_close(found.loss, 0.11 * found.metrics["kl_loss"])


def test_a_controller_needs_something_to_control():
    with pytest.raises(ValueError, match="kl_coef is 0: a kl_controller"):
        RLOO(kl_coef=0.0, kl_controller=AdaptiveKL())


def test_a_reduction_of_token_losses_needs_token_losses():
    with pytest.raises(ValueError, match="loss_agg_mode is 'grpo', but importance_sampling_level 'sequence'"):
        RLOO(loss_agg_mode="grpo", importance_sampling_level="sequence")
    found = RLOO(importance_sampling_level="token", loss_agg_mode="grpo").loss(batch(OLD))
    assert found.loss.item() == pytest.approx(-(2 - 1) / 2)


def test_the_bound_of_the_log_ratio_is_not_reached_in_practice():
    found = GRPO(kl_coef=0.0).loss(batch(OLD + 30.0))
    assert found.loss.item() == pytest.approx((-3 * 2 * 1.2 + math.exp(20)) / 4, rel=1e-5)
