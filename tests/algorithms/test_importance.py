"""Answers of another policy: truncated importance weights, by hand."""

import math

import pytest
import torch

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from tests.helpers.optimizer_tables import ADVANTAGES, MASK, OLD, REFERENCE, batch

SAMPLER = OLD - torch.tensor([[0.5, -0.25, 1.5], [-0.5, 9.0, 9.0]])
"""The policy makes tokens likelier by these, in log; behind the mask they do not matter."""
WEIGHTS = torch.tensor([[math.exp(0.5), math.exp(-0.25), 2.0], [math.exp(-0.5), 1.0, 1.0]])
"""Truncated at 2."""


def gradient(optimizer, **more):
    logprobs = OLD.clone().requires_grad_()
    (found,) = torch.autograd.grad(optimizer.loss(batch(logprobs, **more)).loss, logprobs)
    return found


@pytest.mark.parametrize(
    "optimizer",
    [GRPO(kl_coef=0.0), ReinforcePlusPlus(), RLOO(importance_sampling_level="token", loss_agg_mode="token_mean")],
)
def test_each_token_has_its_weight(optimizer):
    found = gradient(optimizer, behavior_logprobs=SAMPLER, importance_clip=2.0)
    torch.testing.assert_close(found, -WEIGHTS * ADVANTAGES[:, None] * MASK / 4)


def test_in_the_sequence_form_an_answer_has_one_weight():
    found = gradient(RLOO(importance_sampling_level="sequence"), behavior_logprobs=SAMPLER, importance_clip=3.0)
    weights = torch.tensor([3.0, math.exp(-0.5)])  # exp(0.5 - 0.25 + 1.5) is truncated
    torch.testing.assert_close(found, -(weights * ADVANTAGES)[:, None] * MASK / 2)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_a_kl_in_the_loss_is_weighted_too(kl):
    optimizer = GRPO(kl_coef=0.5, kl=kl)
    options = {"ref_logprobs": REFERENCE, "advantages": 0 * ADVANTAGES}
    plain, weighted = (
        gradient(optimizer, **options),
        gradient(optimizer, behavior_logprobs=SAMPLER, importance_clip=2.0, **options),
    )
    torch.testing.assert_close(weighted, WEIGHTS * plain)


def test_what_is_logged_is_what_is_used():
    tokens = (
        RLOO(importance_sampling_level="token").loss(batch(OLD, behavior_logprobs=SAMPLER, importance_clip=2.0)).metrics
    )
    assert tokens["off_policy/weight"].item() == pytest.approx(WEIGHTS[MASK].mean().item())
    assert tokens["off_policy/capped"].item() == 0.25
    answers = (
        RLOO(importance_sampling_level="sequence")
        .loss(batch(OLD, behavior_logprobs=SAMPLER, importance_clip=3.0))
        .metrics
    )
    assert answers["off_policy/weight"].item() == pytest.approx((3 + math.exp(-0.5)) / 2)
    assert answers["off_policy/capped"].item() == 0.5
    assert not any("off_policy" in name for name in RLOO().loss(batch(OLD, behavior_logprobs=SAMPLER)).metrics)


def test_without_a_cap_or_another_sampler_nothing_is_weighted():
    optimizer = GRPO(kl_coef=0.0)
    plain = gradient(optimizer)
    assert torch.equal(gradient(optimizer, behavior_logprobs=SAMPLER), plain)
    assert torch.equal(gradient(optimizer, importance_clip=2.0), plain)
    assert torch.equal(gradient(optimizer, importance_clip=2.0, behavior_logprobs=OLD), plain)


def test_ppo_weights_the_policy_and_not_the_critic():
    values = torch.zeros_like(OLD).requires_grad_()
    more = {"values": values, "old_values": torch.zeros_like(OLD), "returns": torch.ones_like(OLD)}
    torch.testing.assert_close(
        gradient(PPO(), behavior_logprobs=SAMPLER, importance_clip=2.0, **more),
        -WEIGHTS * ADVANTAGES[:, None] * MASK / 4,
    )
    losses = [
        PPO().loss(batch(OLD, **more, **own)).metrics["value_loss"]
        for own in ({}, {"behavior_logprobs": SAMPLER, "importance_clip": 2.0})
    ]
    assert losses[0] == losses[1] > 0


def test_the_weighted_gradient_is_that_of_the_policy_in_expectation():
    """Over all tokens: weights turn a mean under the sampler into one under the policy."""
    logits, behavior_logprobs = torch.tensor([0.3, -0.2, 0.8], requires_grad=True), torch.tensor([0.5, 0.3, 0.2])
    gain = torch.tensor([1.0, -2.0, 0.5])
    (wanted,) = torch.autograd.grad((logits.softmax(0) * gain).sum(), logits)
    found = torch.zeros(3)
    for token in range(3):
        logprobs = logits.log_softmax(0)[token].reshape(1, 1)
        one = torch.ones(1, 1, dtype=torch.bool)
        given = batch(logprobs, logprobs.detach(), None, gain[token : token + 1], one, 1)
        given.behavior_logprobs, given.importance_clip = behavior_logprobs[token].log().reshape(1, 1), 100.0
        (part,) = torch.autograd.grad(RLOO().loss(given).loss, logits)
        found -= behavior_logprobs[token] * part
    torch.testing.assert_close(found, wanted)
