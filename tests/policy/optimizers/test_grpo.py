import math

import pytest
import torch

from moslim.policy.kl import k2, k3
from moslim.policy.optimizers import GRPO
from moslim.policy.optimizers.grpo import reduce_tokens
from tests.policy.optimizers.test_base import scores

MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, 0.0, 0.0]])
ADVANTAGES = torch.tensor([2.0, -1.0])
REDUCTIONS = ("grpo", "token_mean", "constant")


def test_advantages_in_group_standard_deviations():
    # Mean 3, squared distances 4 + 1 + 9, Bessel-corrected variance 7.
    given = scores([[1.0, 2.0, 6.0]])
    distance = torch.tensor([[-2.0, -1.0, 3.0]])
    torch.testing.assert_close(GRPO().advantages(given), distance / (math.sqrt(7) + 1e-4))
    torch.testing.assert_close(GRPO(scale=False).advantages(given), distance)


def test_groups_are_apart_and_equal_answers_get_nothing():
    found = GRPO().advantages(scores([[0.0, 2.0], [5.0, 5.0]]))
    expected = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(found, torch.tensor([[-expected, expected], [0.0, 0.0]]))


def test_kl_is_no_part_of_the_advantages_but_the_penalty_is():
    given = scores([[0.0, 0.0]], kl=[[5.0, -5.0]], penalty=torch.tensor([[0.0, 2.0]]))
    assert GRPO(scale=False, kl_coef=1.0).advantages(given).tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("grpo", (2.0 + 9.0) / 2), ("token_mean", 15 / 4), ("constant", (6 / 5 + 9 / 5) / 2)]
)
def test_the_three_reductions(reduction, expected):
    values = torch.tensor([[1.0, 2.0, 3.0], [9.0, 100.0, 100.0]])
    assert reduce_tokens(values, MASK, reduction, 5).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_loss_and_gradient(reduction):
    logprobs = OLD.clone().requires_grad_()
    found = GRPO(kl_coef=0.0, reduction=reduction).loss(logprobs, OLD, None, ADVANTAGES, MASK, 5)
    weights = {
        "grpo": torch.tensor([[1 / 6] * 3, [1 / 2, 0, 0]]),
        "token_mean": torch.tensor([[1 / 4] * 3, [1 / 4, 0, 0]]),
        "constant": torch.tensor([[1 / 10] * 3, [1 / 10, 0, 0]]),
    }[reduction]
    torch.testing.assert_close(found.loss, -(ADVANTAGES[:, None] * weights).sum())
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    torch.testing.assert_close(gradient, -ADVANTAGES[:, None] * weights)
    assert found.metrics.keys() == {"clip_fraction"}


def test_tokens_are_clipped_one_by_one():
    logprobs = (OLD + torch.tensor([[0.5, 0.0, -0.5], [-0.5, 0.0, 0.0]])).requires_grad_()
    optimizer = GRPO(kl_coef=0.0, clip_low=0.2, clip_high=0.28, reduction="token_mean")
    found = optimizer.loss(logprobs, OLD, None, ADVANTAGES, MASK, 5)
    objective = [2 * 1.28, 2.0, 2 * math.exp(-0.5), -0.8]
    assert found.loss.item() == pytest.approx(-sum(objective) / 4, rel=1e-5)
    assert found.metrics["clip_fraction"] == 0.5
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    expected = [[0.0, -2 / 4, -2 * math.exp(-0.5) / 4], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("kind", "estimate"), [("k2", k2), ("k3", k3)])
def test_kl_term_on_policy(kind, estimate, reduction):
    found = GRPO(kl_coef=0.5, kl=kind, reduction=reduction).loss(OLD, OLD, REFERENCE, 0 * ADVANTAGES, MASK, 5)
    expected = reduce_tokens(estimate(OLD, REFERENCE), MASK, reduction, 5)
    torch.testing.assert_close(found.metrics["kl_loss"], expected)
    torch.testing.assert_close(found.loss, 0.5 * expected)


def test_k3_is_weighted_by_the_ratio():
    logprobs = OLD + torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.0, 0.0]])
    found = GRPO(kl="k3").loss(logprobs, OLD, REFERENCE, ADVANTAGES, MASK, 5)
    weighted = (logprobs - OLD).exp() * k3(logprobs, REFERENCE)
    torch.testing.assert_close(found.metrics["kl_loss"], (weighted * MASK).sum() / 4)


def test_gradient_of_the_weighted_k3_is_that_of_the_divergence_off_policy_too():
    logits = torch.tensor([0.4, -0.3, 1.1], requires_grad=True)
    q, old = torch.tensor([0.3, 0.3, 0.4]), torch.tensor([0.5, 0.2, 0.3])
    p = logits.softmax(dim=0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)
    # Every token once, as an answer of its own, with the weight that the sampler gives it.
    optimizer, found = GRPO(kl_coef=1.0, kl="k3", reduction="token_mean"), torch.zeros(3)
    for token in range(3):
        now = logits.log_softmax(dim=0)[token].reshape(1, 1)
        before, reference = old[token].log().reshape(1, 1), q[token].log().reshape(1, 1)
        parts = optimizer.loss(now, before, reference, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), 1)
        found += old[token] * torch.autograd.grad(parts.loss, logits)[0]
    torch.testing.assert_close(found, wanted)


def test_without_a_reference_or_weight_there_is_no_kl_term():
    for optimizer, reference in ((GRPO(kl_coef=0.0), REFERENCE), (GRPO(kl_coef=0.5), None)):
        assert "kl_loss" not in optimizer.loss(OLD, OLD, reference, ADVANTAGES, MASK, 5).metrics


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_is_ignored(reduction):
    rubbish = torch.where(MASK, OLD, torch.tensor(7.0))
    optimizer = GRPO(reduction=reduction)
    clean = optimizer.loss(OLD + 0.1, OLD, REFERENCE, ADVANTAGES, MASK, 5)
    dirty = optimizer.loss(rubbish + 0.1, OLD, REFERENCE, ADVANTAGES, MASK, 5)
    torch.testing.assert_close(dirty.loss, clean.loss)


@pytest.mark.parametrize(("option", "value"), [("kl", "k1"), ("reduction", "mean")])
def test_wrong_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} is '{value}'"):
        GRPO(**{option: value})
