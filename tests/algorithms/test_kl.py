import math

import pytest
import torch

from moslim.algorithms.functional import check_kl, k1, k2, k3, kl_loss

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0])
REFERENCE = torch.tensor([-1.0, -1.0, -2.5, -3.5])  # x = 0, -1, 2, 0.5


def test_the_three_estimates_by_hand():
    assert k1(LOGPROBS, REFERENCE).tolist() == [0, -1, 2, 0.5]
    assert k2(LOGPROBS, REFERENCE).tolist() == [0, 0.5, 2, 0.125]
    expected = [0.0, math.e - 2, math.exp(-2) + 1, math.exp(-0.5) - 0.5]
    torch.testing.assert_close(k3(LOGPROBS, REFERENCE), torch.tensor(expected))


def test_k1_and_k3_are_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    for estimate in (k1, k3):
        torch.testing.assert_close((p * estimate(p.log(), q.log())).sum(), exact)


def test_gradients_in_the_loss():
    """On policy: k1 none on average, k2 that of the divergence itself."""
    logits, q = torch.tensor([0.4, -0.3, 1.1], requires_grad=True), torch.tensor([0.3, 0.3, 0.4])
    p = logits.softmax(dim=0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)

    def expected_gradient(estimate):
        logprobs = logits.log_softmax(dim=0)
        return torch.autograd.grad((logprobs.exp().detach() * estimate(logprobs, q.log())).sum(), logits)[0]

    torch.testing.assert_close(expected_gradient(k1), torch.zeros(3), atol=1e-7, rtol=0)
    torch.testing.assert_close(expected_gradient(k2), wanted)
    assert not torch.allclose(expected_gradient(k3), wanted, atol=1e-2)


def test_k3_does_not_overflow():
    found = k3(torch.tensor([-500.0, 500.0]), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([math.exp(20) - 21, 19.0]))


def test_on_policy_the_loss_is_the_estimate():
    for kind, estimate in (("k2", k2), ("k3", k3)):
        assert torch.equal(kl_loss(kind, LOGPROBS, REFERENCE, torch.zeros(4)), estimate(LOGPROBS, REFERENCE))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_gradient_of_the_loss_is_that_of_the_divergence_off_policy_too(kind):
    logits, q = torch.tensor([0.4, -0.3, 1.1], requires_grad=True), torch.tensor([0.3, 0.3, 0.4])
    old, p = torch.tensor([0.5, 0.2, 0.3]), logits.softmax(dim=0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)
    logprobs = logits.log_softmax(dim=0)
    loss = (old * kl_loss(kind, logprobs, q.log(), logprobs - old.log())).sum()  # tokens as the sampler draws them
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)


def test_why_the_refused_combinations_are_refused():
    """In the reward, an estimate times grad log p: right for k1, wrong for k2 and k3."""
    logits, q = torch.tensor([0.4, -0.3, 1.1], requires_grad=True), torch.tensor([0.3, 0.3, 0.4])
    p = logits.softmax(dim=0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    for estimate, right in ((k1, True), (k2, False), (k3, False)):
        logprobs = logits.log_softmax(dim=0)
        score = (p.detach() * estimate(logprobs, q.log()).detach() * logprobs).sum()
        found = torch.autograd.grad(score, logits)[0]
        assert torch.allclose(found, wanted, atol=1e-6) == right


@pytest.mark.parametrize(("place", "kind"), [("loss", "k1"), ("loss", "k4"), ("reward", "k2"), ("reward", "k3")])
def test_an_estimate_without_a_useful_gradient_is_refused(place, kind):
    with pytest.raises(ValueError, match=f"kl_in is '{place}', kl is '{kind}'.*give kl"):
        check_kl(place, kind)
    with pytest.raises(ValueError, match="kl is 'k1'"):
        kl_loss("k1", LOGPROBS, REFERENCE, torch.zeros(4))
