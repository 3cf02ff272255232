import math

import pytest
import torch

from moslim.algorithms.rloo import RLOO
from tests.helpers.optimizer_tables import ADVANTAGES, MASK, OLD, batch, scores


def test_each_answer_is_compared_with_the_others():
    # Others' means: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; the second group is on its own.
    found = RLOO(kl_coef=0.0).advantages(scores([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert found.tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]


def test_kl_and_penalty_stand_inside_the_baseline():
    given = scores([[1.0, 2.0, 6.0]], kl=[[2.0, 0.0, -2.0]], penalty=torch.tensor([[0.0, 0.0, 3.0]]))
    # Scores 1 - 0.5 * 2 = 0, 2, 6 + 1 - 3 = 4.
    assert RLOO(kl_coef=0.5).advantages(given).tolist() == [[-3.0, 0.0, 3.0]]


def test_dimensions_normalised_first():
    given = scores([[9.0, 9.0]], per_dimension=[[[0.0, 4.0], [2.0, 4.0]]])
    found = RLOO(aggregation="normalize_then_sum", std_floor=0.0).advantages(given)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0]]) * 2 / math.sqrt(2))


def test_sequence_loss_by_hand():
    logprobs = OLD + torch.tensor([[0.05, 0.1, -0.05], [-0.1, 0.0, 0.0]])
    found = RLOO(importance_sampling_level="sequence").loss(batch(logprobs))
    expected = -(2 * math.exp(0.1) - math.exp(-0.1)) / 2
    assert found.loss.item() == pytest.approx(expected, rel=1e-5) and found.metrics["clip_fraction"] == 0


def test_token_loss_by_hand():
    logprobs = OLD + torch.tensor([[0.05, 0.1, -0.05], [-0.1, 0.0, 0.0]])
    found = RLOO(importance_sampling_level="token").loss(batch(logprobs))
    expected = -(2 * (math.exp(0.05) + math.exp(0.1) + math.exp(-0.05)) - math.exp(-0.1)) / (2 * 5)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5) and found.metrics["clip_fraction"] == 0


def test_on_policy_gradients_agree_up_to_the_length_limit():
    gradients = {}
    for ratio in ("sequence", "token"):
        logprobs = OLD.clone().requires_grad_()
        parts = RLOO(importance_sampling_level=ratio).loss(batch(logprobs))
        (gradients[ratio],) = torch.autograd.grad(parts.loss, logprobs)
    expected = -ADVANTAGES[:, None] * MASK / 2  # minus advantage per answer token, mean over two answers
    torch.testing.assert_close(gradients["sequence"], expected)
    torch.testing.assert_close(gradients["token"], expected / 5)


@pytest.mark.parametrize(
    ("shift", "advantage", "objective", "clipped"),
    [
        (0.3, 1.0, 1.2, 1.0),  # a good answer is likely enough: no gradient
        (-0.3, 1.0, math.exp(-0.3), 0.0),
        (0.3, -1.0, -math.exp(0.3), 0.0),
        (-0.3, -1.0, -0.8, 1.0),  # a bad one is unlikely enough
    ],
)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_clipping(ratio, shift, advantage, objective, clipped):
    logprobs = torch.tensor([[-1.0 + shift]], requires_grad=True)
    one, mask = torch.tensor([[-1.0]]), torch.tensor([[True]])
    found = RLOO(importance_sampling_level=ratio).loss(batch(logprobs, one, None, torch.tensor([advantage]), mask, 1))
    assert found.loss.item() == pytest.approx(-objective, rel=1e-5) and found.metrics["clip_fraction"] == clipped
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient.item() == pytest.approx(0 if clipped else -objective, rel=1e-5)


def test_the_sequence_ratio_clips_what_its_tokens_would_not():
    logprobs = OLD + torch.tensor([[0.15, 0.15, 0.15], [0.0, 0.0, 0.0]])
    found = {kind: RLOO(importance_sampling_level=kind).loss(batch(logprobs)) for kind in ("sequence", "token")}
    assert found["sequence"].metrics["clip_fraction"] == 0.5 and found["token"].metrics["clip_fraction"] == 0


def test_padding_is_ignored():
    rubbish = torch.where(MASK, OLD, torch.tensor(7.0))
    for ratio in ("sequence", "token"):
        clean = RLOO(importance_sampling_level=ratio).loss(batch(OLD + 0.1))
        dirty = RLOO(importance_sampling_level=ratio).loss(batch(rubbish + 0.1))
        assert torch.equal(clean.loss, dirty.loss)
        assert torch.equal(clean.metrics["clip_fraction"], dirty.metrics["clip_fraction"])


def test_an_unknown_ratio_is_named():
    with pytest.raises(ValueError, match="importance_sampling_level is 'word'"):
        RLOO(importance_sampling_level="word")
