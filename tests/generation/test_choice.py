"""Drawn tokens follow the distribution that they are said to be drawn from."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from moslim.generation.decoding import TokenChoice, cut

NOISE = torch.rand(20000, generator=torch.Generator().manual_seed(3))
PROBABILITIES = torch.tensor([0.05, 0.0, 0.4, 0.25, 0.3, 0.0])


def drawn(**options):
    generator = torch.Generator().manual_seed(4)
    return TokenChoice(**options)(PROBABILITIES.log().expand(20000, -1), NOISE, generator)


def chi_square(tokens, wanted):
    counts = tokens.bincount(minlength=6).double()
    assert (counts[wanted == 0] == 0).all()
    possible = wanted > 0
    return ((counts - 20000 * wanted)[possible] ** 2 / (20000 * wanted[possible])).sum()


@pytest.mark.parametrize("method", ["inverse_cdf", "multinomial"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_drawn_tokens_follow_the_tempered_probabilities(temperature, method):
    found = drawn(temperature=temperature, method=method)
    wanted = PROBABILITIES ** (1 / temperature) / (PROBABILITIES ** (1 / temperature)).sum()
    assert chi_square(found.tokens, wanted) < 16.27  # 3 degrees of freedom, p = 0.001
    torch.testing.assert_close(found.logprobs, wanted.log()[found.tokens])
    assert found.behavior_logprobs is None


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 3}, [0, 0, 0.4, 0.25, 0.3, 0]),
        ({"top_p": 0.6}, [0, 0, 0.4, 0, 0.3, 0]),
        ({"top_p": 0.1}, [0, 0, 0.4, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.9}, [0, 0, 0.4, 0, 0.3, 0]),
        ({"top_k": 3, "top_p": 0.4}, [0, 0, 0.4, 0, 0, 0]),
    ],
)
def test_what_is_cut_is_not_drawn_and_both_log_probabilities_are_known(options, left):
    found = drawn(**options)
    kept = torch.tensor(left)
    if len(kept.nonzero()) > 1:
        assert chi_square(found.tokens, kept / kept.sum()) < 13.82  # 2 degrees of freedom, p = 0.001
    torch.testing.assert_close(found.behavior_logprobs, (kept / kept.sum()).log()[found.tokens])
    torch.testing.assert_close(found.logprobs, PROBABILITIES.log()[found.tokens])


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (None, 0.3), (None, 0.95), (40, 0.8), (1, 1.0)])
def test_what_is_cut_is_what_generate_cuts(top_k, top_p):
    logits = torch.randn(30, 100, generator=torch.Generator().manual_seed(5)) * 3
    steps = ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    expected = LogitsProcessorList(steps)(None, logits).log_softmax(dim=-1)
    torch.testing.assert_close(cut(logits.log_softmax(dim=-1), top_k, top_p), expected)


def test_the_extremes_of_the_noise_draw_possible_tokens():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf]).expand(3, -1)
    assert TokenChoice()(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-24])).tokens.tolist() == [3, 3, 1]


def test_temperature_zero_takes_the_most_likely_token_with_its_logprob_at_one():
    found = TokenChoice(temperature=0, top_k=1)(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([0.01]))
    assert found.tokens.tolist() == [1] and found.logprobs.item() == pytest.approx(math.log(0.75))
    assert found.behavior_logprobs is None
