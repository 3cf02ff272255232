import math

import pytest
import torch

from moslim.lora import LoraOptions
from moslim.policy.logprobs import answer_logprobs
from moslim.policy.packing import Passes
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout
from moslim.policy.update import forward
from tests.policy.conftest import build_model

LORA = LoraOptions(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
PLAIN = Passes(share_prompts="never", chunked_logprobs=False)
PASSES = [PLAIN, Passes(), Passes(tokens=9, share_prompts="always"), Passes(tokens=20, share_prompts="never")]


@pytest.fixture
def rows(tokenizer):
    """Six answers, of which numbers 1, 2 and 5 are to prompts that ask for nothing."""
    ids = torch.randint(6, len(tokenizer), (6, 9), generator=torch.Generator().manual_seed(4))
    ids[[3, 2], :5] = ids[[0, 1], :5]  # two pairs of answers to one prompt each
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3, 3])[:, None]
    attention = torch.cat([torch.ones(6, 5, dtype=torch.long), mask.long()], dim=1)
    targets = torch.tensor([[1, -1], [-1, -1], [-1, -1], [2, 0], [-1, 3], [-1, -1]])
    nothing = torch.zeros(6)
    return Rollout(
        (0, 0), ids, attention, mask, nothing[:, None].expand(-1, 4), None, targets, nothing, nothing, nothing, nothing,
        mask[:, 0], ["q"] * 6, ["a"] * 6,
    )  # fmt: skip


@pytest.fixture(params=[None, LORA], ids=["full", "lora"])
def roles(request, tokenizer):
    """A policy that has moved away from its reference."""
    torch.manual_seed(0)
    roles = Roles(build_model("grouped", tokenizer), request.param)
    for p in roles.policy.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return roles


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("default_kl", [True, False])
def test_logprobs_are_those_of_the_whole_batch(roles, rows, passes, default_kl):
    expected = answer_logprobs(roles.policy, rows.batch, 0.7, PLAIN)
    found = forward(roles.policy, roles, rows, 0.7, passes, default_kl).logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[~rows.mask] == 0).all()


@pytest.mark.parametrize("passes", PASSES)
def test_default_kl_is_the_mean_over_tokens_of_prompts_without_instruction(roles, rows, passes):
    found = forward(roles.policy, roles, rows, 1.0, passes, default_kl=True)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "use_cache": False}
    mine = roles.policy(**inputs).logits[:, 4:-1].log_softmax(dim=-1)
    with roles.reference() as reference, torch.no_grad():
        theirs = reference(**inputs).logits[:, 4:-1].log_softmax(dim=-1)
    chosen = rows.mask & torch.tensor([0, 1, 1, 0, 0, 1]).bool()[:, None]
    expected = (mine.exp() * (mine - theirs)).sum(dim=-1)[chosen].mean()
    assert expected > 0.01
    torch.testing.assert_close(found.default_kl, expected, atol=1e-5, rtol=1e-5)
    trained = [p for p in roles.policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found.default_kl, trained, retain_graph=True)
    for one, other in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("passes", PASSES)
def test_entropy_is_the_mean_over_answer_tokens(roles, rows, passes):
    found = forward(roles.policy, roles, rows, 0.7, passes, default_kl=True).entropy
    logits = roles.policy(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    logp = (logits[:, 4:-1] / 0.7).log_softmax(dim=-1)
    torch.testing.assert_close(found, -(logp.exp() * logp).sum(dim=-1)[rows.mask].mean())


def test_at_the_start_the_default_has_not_moved(tokenizer, rows):
    roles = Roles(build_model("grouped", tokenizer), LORA)
    assert forward(roles.policy, roles, rows, 1.0, Passes(), default_kl=True).default_kl.item() == 0


def test_without_such_prompts_or_weight_there_is_no_default_kl(roles, rows):
    instructed = rows.rows(torch.tensor([0, 3, 4]))
    assert forward(roles.policy, roles, instructed, 1.0, Passes(), default_kl=True).default_kl is None
    assert forward(roles.policy, roles, rows, 1.0, Passes(), default_kl=False).default_kl is None


def test_a_hand_made_divergence(tokenizer, rows):
    """A policy that gives one token all other odds than its reference, at every place."""
    roles = Roles(build_model("llama", tokenizer), None)
    roles.policy.lm_head.weight.data.zero_()
    for model in (roles.policy, roles._copy):
        model.lm_head.weight.data.zero_()
    size = len(tokenizer)
    roles.policy.lm_head.register_forward_hook(lambda _, __, out: out + math.log(3) * (torch.arange(size) == 7))
    found = forward(roles.policy, roles, rows, 1.0, Passes(), default_kl=True).default_kl.item()
    p = 3 / (size + 2)
    expected = p * math.log(p * size) + (1 - p) * math.log(size / (size + 2))
    assert found == pytest.approx(expected, rel=1e-4)
