"""Numbers over the vocabulary from few logits at a time, against the plain form."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moslim.ops.chunked_linear import Head, of_hidden, of_logits

TOKENS, WIDTH, WORDS = 13, 6, 11


def linear(seed: int, bias: bool) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, WORDS, bias=bias)


@pytest.fixture
def inputs():
    """Hidden states, those of a reference, tokens, and a weight for each of the three numbers of a token."""
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, TOKENS, WIDTH, generator=generator) * 3
    tokens = torch.randint(WORDS, (TOKENS,), generator=generator)
    return hidden, other, tokens, torch.randn(3, TOKENS, generator=generator)


def total(found, weights):
    parts = (found.logprobs, found.entropy, found.kl)
    return sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True) if part is not None)


@pytest.mark.parametrize("held", [1, 3 * WORDS, 5 * WORDS + 2, 1 << 22])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("bias", "then"), [(True, {}), (False, {}), (True, {"scale": 1.7, "softcap": 2.0})])
@pytest.mark.parametrize(("entropy", "kl"), [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients_are_those_of_the_plain_form(inputs, held, temperature, bias, then, entropy, kl):
    hidden, other, tokens, weights = inputs
    layers = linear(1, bias), linear(2, bias)
    head, reference = (Head(layer, **then) for layer in layers)
    results = []
    for plain in (True, False):
        states = hidden.clone().requires_grad_()
        if plain:
            wanted = reference(other).detach() if kl else None
            found = of_logits(head(states), tokens, temperature, entropy, wanted)
        else:
            found = of_hidden(states, head, tokens, temperature, entropy, (other, reference) if kl else None, held)
        assert (found.entropy is None, found.kl is None) == (not entropy, not kl)
        gradients = torch.autograd.grad(total(found, weights), [states, *layers[0].parameters()])
        results.append((found, gradients))
    (expected, wanted), (found, gradients) = results
    for name in ("logprobs", "entropy", "kl"):
        if getattr(found, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    for one, two in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        again = of_hidden(hidden, head, tokens, temperature, held=held).logprobs
    torch.testing.assert_close(again, expected.logprobs, atol=1e-5, rtol=1e-5)


def test_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [5 + math.log(3.0), 5.0]])
    found = of_logits(logits, torch.tensor([0, 1]), 1.0, entropy=True, ref_logits=other)
    torch.testing.assert_close(found.logprobs, torch.tensor([0.5, 0.25]).log())
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2.0), entropy]))
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(found.kl, torch.tensor([divergence, 0.0]))


def test_one_number_can_have_the_gradient_alone(inputs):
    hidden, other, tokens, _ = inputs
    head, reference = linear(1, True), linear(2, True)
    states = hidden.requires_grad_()
    found = of_hidden(states, Head(head), tokens, 0.7, True, (other, Head(reference)), held=4 * WORDS)
    plain = of_logits(head(states), tokens, 0.7, True, reference(other).detach())
    for name in ("logprobs", "entropy", "kl"):
        mine, theirs = (
            torch.autograd.grad(getattr(x, name).sum(), states, retain_graph=True)[0] for x in (found, plain)
        )
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_frozen_layer_and_a_frozen_backbone(inputs):
    hidden, _, tokens, _ = inputs
    head = linear(1, True)
    both = torch.autograd.grad(
        of_hidden(hidden.requires_grad_(), Head(head), tokens, 1.0).logprobs.sum(), [hidden, *head.parameters()]
    )
    own = torch.autograd.grad(
        of_hidden(hidden.detach(), Head(head), tokens, 1.0).logprobs.sum(), list(head.parameters())
    )
    head.requires_grad_(False)
    (rest,) = torch.autograd.grad(of_hidden(hidden, Head(head), tokens, 1.0).logprobs.sum(), [hidden])
    assert torch.equal(rest, both[0]) and all(torch.equal(a, b) for a, b in zip(own, both[1:], strict=True))


def test_no_tokens_at_all():
    head = linear(1, False)
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    found = of_hidden(hidden, Head(head), torch.zeros(0, dtype=torch.long), 1.0).logprobs
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, WIDTH)


def test_half_precision_gives_float32_numbers_and_gradients_of_its_own_type(inputs):
    hidden, _, tokens, _ = inputs
    head = linear(1, True).bfloat16()
    states = hidden.bfloat16().requires_grad_()
    found = of_hidden(states, Head(head), tokens, 1.0, held=2 * WORDS).logprobs
    expected = head(states).float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    gradients = torch.autograd.grad(found.sum(), [states, head.weight, head.bias])
    plain = torch.autograd.grad(expected.sum(), [states, head.weight, head.bias])
    for one, two in zip(gradients, plain, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, two, atol=0.05, rtol=0.05)


def test_under_autocast_the_layer_is_applied_in_half_precision(inputs):
    hidden, _, tokens, _ = inputs
    head = linear(1, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = hidden.clone().requires_grad_()
        found = of_hidden(states, Head(head), tokens, 1.0).logprobs
        expected = head(states).float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    mine, theirs = (torch.autograd.grad(x.sum(), [states, head.weight]) for x in (found, expected))
    for one, two in zip(mine, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.05, rtol=0.05)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was computed."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def test_no_tensor_holds_the_logits_of_all_tokens(inputs):
    hidden, other, tokens, weights = inputs
    head, reference = linear(1, True), linear(2, True)
    held = 4 * WORDS
    with Largest() as largest:
        states = hidden.clone().requires_grad_()
        total(of_hidden(states, Head(head), tokens, 0.7, True, (other, Head(reference)), held), weights).backward()
    assert largest.numbers == max(TOKENS * WIDTH, WORDS * WIDTH)  # the hidden states, the layer's gradient
    assert held < largest.numbers < TOKENS * WORDS
