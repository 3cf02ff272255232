import math

import pytest
import torch

from moslim.algorithms.functional import k2, k3, reduce_tokens
from moslim.algorithms.grpo import GRPO
from tests.helpers.optimizer_tables import ADVANTAGES, MASK, OLD, REDUCTIONS, REFERENCE, batch, scores


def test_advantages_in_group_standard_deviations():
    # Mean 3, squared distances 4 + 1 + 9, Bessel-corrected variance 7.
    given = scores([[1.0, 2.0, 6.0]])
    distance = torch.tensor([[-2.0, -1.0, 3.0]])
    torch.testing.assert_close(GRPO(std_floor=0.0).advantages(given), distance / (math.sqrt(7) + 1e-4))
    torch.testing.assert_close(GRPO(std_floor=3.0).advantages(given), distance / (math.sqrt(7 + 9) + 1e-4))
    torch.testing.assert_close(GRPO(scale="none").advantages(given), distance)


def test_advantages_in_standard_deviations_of_the_batch():
    # Scores 0, 2, 4, 10 around 4: variance (16 + 4 + 0 + 36) / 3.
    found = GRPO(scale="batch", std_floor=0.0).advantages(scores([[0.0, 2.0], [4.0, 10.0]]))
    expected = torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]) / (math.sqrt(56 / 3) + 1e-4)
    torch.testing.assert_close(found, expected)


def test_gdpo_is_normalise_then_sum_in_standard_deviations_of_the_batch():
    # Dimension 0 of the first group is twice as common a success as dimension 1; normalised apart, both tell.
    rewards = [[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 4]
    found = GRPO(aggregation="normalize_then_sum", scale="batch", std_floor=0.0).advantages(
        scores([[0.0] * 4] * 2, per_dimension=rewards)
    )
    first, second = torch.tensor([1.0, 1, -1, -1]), torch.tensor([-1.0, 3, -1, -1]) / math.sqrt(3)
    total = torch.stack([(first + second) / math.sqrt(2), torch.zeros(4)])
    torch.testing.assert_close(found, total / (total.std() + 1e-4))


def test_groups_without_spread_are_left_out():
    given = scores([[0.0, 0.3], [1.0, 3.0], [5.0, 5.0]], kl=[[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert GRPO().used(given).all()
    assert GRPO(min_spread=0.0).used(given).tolist() == [[True, True], [True, True], [False, False]]
    assert GRPO(min_spread=0.5, kl_in="reward", kl="k1").used(given).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_answers_left_out_do_not_count():
    logprobs = OLD + 0.1
    for loss_agg_mode in REDUCTIONS:
        optimizer = GRPO(loss_agg_mode=loss_agg_mode)
        alone = optimizer.loss(batch(logprobs[:1], OLD[:1], REFERENCE[:1], ADVANTAGES[:1], MASK[:1]))
        mask = MASK & torch.tensor([[True], [False]])
        torch.testing.assert_close(optimizer.loss(batch(logprobs, OLD, REFERENCE, mask=mask)).loss, alone.loss)
        nothing = optimizer.loss(batch(logprobs.requires_grad_(), OLD, REFERENCE, mask=mask & False)).loss
        assert nothing.item() == 0 and (torch.autograd.grad(nothing, logprobs)[0] == 0).all()
        logprobs = logprobs.detach()


def test_groups_are_apart_and_equal_answers_get_nothing():
    found = GRPO(std_floor=0.0).advantages(scores([[0.0, 2.0], [5.0, 5.0]]))
    expected = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(found, torch.tensor([[-expected, expected], [0.0, 0.0]]))


def test_kl_is_no_part_of_the_advantages_but_the_penalty_is():
    given = scores([[0.0, 0.0]], kl=[[5.0, -5.0]], penalty=torch.tensor([[0.0, 2.0]]))
    assert GRPO(scale="none", kl_coef=1.0).advantages(given).tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("loss_agg_mode", REDUCTIONS)
def test_on_policy_loss_and_gradient(loss_agg_mode):
    logprobs = OLD.clone().requires_grad_()
    found = GRPO(kl_coef=0.0, loss_agg_mode=loss_agg_mode).loss(batch(logprobs))
    weights = {
        "grpo": torch.tensor([[1 / 6] * 3, [1 / 2, 0, 0]]),
        "token_mean": torch.tensor([[1 / 4] * 3, [1 / 4, 0, 0]]),
        "constant": torch.tensor([[1 / 10] * 3, [1 / 10, 0, 0]]),
    }[loss_agg_mode]
    torch.testing.assert_close(found.loss, -(ADVANTAGES[:, None] * weights).sum())
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    torch.testing.assert_close(gradient, -ADVANTAGES[:, None] * weights)
    assert found.metrics.keys() == {"clip_fraction"}


def test_tokens_are_clipped_one_by_one():
    logprobs = (OLD + torch.tensor([[0.5, 0.0, -0.5], [-0.5, 0.0, 0.0]])).requires_grad_()
    optimizer = GRPO(kl_coef=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_agg_mode="token_mean")
    found = optimizer.loss(batch(logprobs))
    objective = [2 * 1.28, 2.0, 2 * math.exp(-0.5), -0.8]
    assert found.loss.item() == pytest.approx(-sum(objective) / 4, rel=1e-5)
    assert found.metrics["clip_fraction"] == 0.5
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    expected = [[0.0, -2 / 4, -2 * math.exp(-0.5) / 4], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


@pytest.mark.parametrize("loss_agg_mode", REDUCTIONS)
@pytest.mark.parametrize(("kind", "estimate"), [("k2", k2), ("k3", k3)])
def test_kl_term_on_policy(kind, estimate, loss_agg_mode):
    found = GRPO(kl_coef=0.5, kl=kind, loss_agg_mode=loss_agg_mode).loss(
        batch(OLD, OLD, REFERENCE, 0 * ADVANTAGES, MASK, 5)
    )
    expected = reduce_tokens(estimate(OLD, REFERENCE), MASK, loss_agg_mode, 5)
    torch.testing.assert_close(found.metrics["kl_loss"], expected)
    torch.testing.assert_close(found.loss, 0.5 * expected)


def test_k3_is_weighted_by_the_ratio():
    logprobs = OLD + torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.0, 0.0]])
    found = GRPO(kl="k3").loss(batch(logprobs, ref_logprobs=REFERENCE))
    weighted = (logprobs - OLD).exp() * k3(logprobs, REFERENCE)
    torch.testing.assert_close(found.metrics["kl_loss"], (weighted * MASK).sum() / 4)


def test_gradient_of_the_weighted_k3_is_that_of_the_divergence_off_policy_too():
    logits = torch.tensor([0.4, -0.3, 1.1], requires_grad=True)
    q, old_logprobs = torch.tensor([0.3, 0.3, 0.4]), torch.tensor([0.5, 0.2, 0.3])
    p = logits.softmax(dim=0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)
    # Every token once, as an answer of its own, with the weight that the sampler gives it.
    optimizer, found = GRPO(kl_coef=1.0, kl="k3", loss_agg_mode="token_mean"), torch.zeros(3)
    for token in range(3):
        now = logits.log_softmax(dim=0)[token].reshape(1, 1)
        before, ref_logprobs = old_logprobs[token].log().reshape(1, 1), q[token].log().reshape(1, 1)
        parts = optimizer.loss(batch(now, before, ref_logprobs, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), 1))
        found += old_logprobs[token] * torch.autograd.grad(parts.loss, logits)[0]
    torch.testing.assert_close(found, wanted)


def test_without_a_reference_or_weight_there_is_no_kl_term():
    for optimizer, ref_logprobs in ((GRPO(kl_coef=0.0), REFERENCE), (GRPO(kl_coef=0.5), None)):
        assert "kl_loss" not in optimizer.loss(batch(OLD, OLD, ref_logprobs, ADVANTAGES, MASK, 5)).metrics


@pytest.mark.parametrize("loss_agg_mode", REDUCTIONS)
def test_padding_is_ignored(loss_agg_mode):
    rubbish = torch.where(MASK, OLD, torch.tensor(7.0))
    optimizer = GRPO(loss_agg_mode=loss_agg_mode)
    clean = optimizer.loss(batch(OLD + 0.1, ref_logprobs=REFERENCE))
    dirty = optimizer.loss(batch(rubbish + 0.1, ref_logprobs=REFERENCE))
    torch.testing.assert_close(dirty.loss, clean.loss)


@pytest.mark.parametrize(("option", "value"), [("kl", "k1"), ("loss_agg_mode", "mean"), ("scale", "all")])
def test_wrong_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is '{value}'"):
        GRPO(**{option: value})
