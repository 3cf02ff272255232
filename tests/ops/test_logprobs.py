"""Log-probabilities of whole answers, every way in which they can be computed."""

import pytest
import torch

from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs, plan
from moslim.ops.prefix_tree import Tree
from tests.helpers.policy_models import ARCHITECTURES

PLAIN = ForwardConfig(tokens=10**6, share_prefixes="never", chunked_logprobs=False)
WAYS = {
    "padded": ForwardConfig(tokens=10**6, share_prefixes="never"),
    "padded, small": ForwardConfig(tokens=30, share_prefixes="never"),
    "one by one": ForwardConfig(tokens=1, share_prefixes="never"),
    "shared": ForwardConfig(tokens=10**6, share_prefixes="always"),
    "shared, small": ForwardConfig(tokens=30, share_prefixes="always"),
    "shared, one by one": ForwardConfig(tokens=1, share_prefixes="always"),
    "shared, plain": ForwardConfig(tokens=30, share_prefixes="always", chunked_logprobs=False),
}


@pytest.fixture(scope="module")
def answers(tokenizer):
    """Three prompts of 12, 3 and 7 tokens, three answers each, of 1 to 9; longer than the sliding window."""
    generator = torch.Generator().manual_seed(2)
    owner = torch.arange(9) // 3
    prompt_mask = torch.arange(12) >= 12 - torch.tensor([12, 3, 7])[owner][:, None]
    mask = torch.arange(9) < torch.tensor([2, 9, 1, 4, 3, 8, 2, 5, 1])[:, None]
    attention = torch.cat([prompt_mask, mask], dim=1).long()
    ids = torch.randint(6, len(tokenizer), attention.shape, generator=generator)
    ids[:, :12] = torch.randint(6, len(tokenizer), (3, 12), generator=generator)[owner]
    return CompletionBatch(ids * attention, attention, mask)


def one_by_one(model, batch, temperature):
    """Each answer alone, without padding, from the model's own logits."""
    result = torch.zeros(batch.mask.shape)
    for row, (ids, attention, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, batch.mask, strict=True)):
        own, length = ids[attention.bool()], int(mask.sum())
        logp = (model(own[None]).logits[0, -length - 1 : -1] / (temperature or 1.0)).log_softmax(dim=-1)
        result[row, :length] = logp.gather(-1, own[-length:, None])[:, 0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_and_gradients_are_those_of_each_answer_alone(models, answers, kind, way):
    model = models[kind]
    weights = torch.randn(answers.mask.shape, generator=torch.Generator().manual_seed(0)) / answers.mask.sum()
    expected = one_by_one(model, answers, 1.0)
    found = completion_logprobs(model, answers, 1.0, WAYS[way])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[~answers.mask] == 0).all()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    gradients = torch.autograd.grad((found * weights).sum(), parameters)
    assert max(gradient.abs().max() for gradient in wanted) > 0.01
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 0])
@pytest.mark.parametrize("way", ["padded", "shared", "shared, plain"])
def test_the_temperature_is_the_samplers(models, answers, way, temperature):
    with torch.no_grad():
        found = completion_logprobs(models["grouped"], answers, temperature, WAYS[way])
        torch.testing.assert_close(found, one_by_one(models["grouped"], answers, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", ["always", "never"])
def test_neither_order_nor_what_padding_holds_matters(models, answers, share):
    expected = completion_logprobs(models["qwen2"], answers, 1.0, PLAIN)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    noise = torch.where(answers.attention_mask.bool(), answers.input_ids, torch.arange(21) + 9)
    shuffled = CompletionBatch(noise[order], answers.attention_mask[order], answers.mask[order])
    found = completion_logprobs(models["qwen2"], shuffled, 1.0, ForwardConfig(tokens=40, share_prefixes=share))
    torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=0)


def test_sharing_is_chosen_where_it_pays_and_possible(models, answers):
    def trees(forward_config, among=None, kind="llama"):
        return {isinstance(one.read, Tree) for one in plan(models[kind], answers, forward_config, among)}

    alone = torch.tensor([0, 3, 6])  # one answer to each prompt
    assert trees(ForwardConfig()) == {True} and trees(ForwardConfig(), alone) == {False}
    assert trees(ForwardConfig(share_prefixes="always"), alone) == {True} and trees(
        ForwardConfig(share_prefixes="never")
    ) == {False}
    assert plan(models["llama"], answers, ForwardConfig(), torch.tensor([], dtype=torch.long)) == []


def test_what_answers_begin_with_is_computed_once(models, answers):
    with torch.no_grad():  # the first call tries the architecture with made-up inputs
        completion_logprobs(models["llama"], answers, 1.0, WAYS["shared"])
    seen = []
    handle = models["llama"].model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    ids = answers.input_ids.clone()
    ids[4, 12:15] = ids[3, 12:15]  # an answer of 4 tokens, and one of 3 that is its beginning
    with torch.no_grad():
        completion_logprobs(
            models["llama"], CompletionBatch(ids, answers.attention_mask, answers.mask), 1.0, WAYS["shared"]
        )
    handle.remove()
    # three prompts; answers without their last tokens, of which the shorter of the two has none of its own
    assert [tuple(ids.shape) for ids in seen] == [(1, 12 + 3 + 7 + (1 + 8 + 0) + (3 + 0 + 7) + (1 + 4 + 0))]
