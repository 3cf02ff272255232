"""The critic: what it reads, what its gradient reaches, and that it leaves policy and reference alone."""

import pytest
import torch

from moslim.algorithms.functional import CriticOptions, HiddenStateReader, ValueHead
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import merged
from moslim.policy.policy_models import PolicyModels
from tests.helpers.policy_models import ARCHITECTURES, build_model
from tests.helpers.policy_runs import LORA, PLAIN

FORMS = {
    "head, full": (None, CriticOptions()),
    "head, lora": (LORA, CriticOptions()),
    "adapter": (LORA, CriticOptions(LORA)),
}


@pytest.fixture
def batch(tokenizer):
    """Five answers of one to four tokens: ids, attention and answer masks."""
    ids = torch.randint(6, len(tokenizer), (5, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3])[:, None]
    attention = torch.cat([torch.ones(5, 5, dtype=torch.long), mask.long()], dim=1)
    attention[1, :3] = 0  # a shorter prompt, padded on the left
    return CompletionBatch(ids, attention, mask)


def build(form, tokenizer, kind="grouped"):
    """Roles with a critic that has learnt something."""
    lora, critic = FORMS[form]
    torch.manual_seed(0)
    models = PolicyModels(build_model(kind, tokenizer), lora, critic=critic)
    torch.nn.init.normal_(models.critic.linear.weight)
    return models


def trained(models):
    return {name: p for name, p in models.policy.named_parameters() if p.requires_grad}


def test_a_head_values_states():
    head = ValueHead(2)
    states = torch.tensor([[4.0, 5.0], [6.0, 7.0]])
    assert head(states).tolist() == [0, 0]
    head.linear.weight.data = torch.tensor([[1.0, 0.5]])
    head.linear.bias.data = torch.tensor([10.0])
    assert head(states).tolist() == [10 + 4 + 2.5, 10 + 6 + 3.5]
    assert head(states.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_are_those_under_the_output_layer(kind, models, batch):
    model, ids, attention = models[kind], batch.input_ids, batch.attention_mask
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    hidden = HiddenStateReader(model).states(4, input_ids=ids, attention_mask=attention, position_ids=positions)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits[:, -4:])


@pytest.mark.parametrize("form", ["head, full", "head, lora"])
@torch.no_grad()
def test_each_token_is_valued_by_the_state_before_it(form, tokenizer, batch):
    models = build(form, tokenizer)
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": positions}
    hidden = HiddenStateReader(models.policy).states(9, **inputs)
    expected = models.critic(hidden[:, 4:8]) * batch.mask  # prompts have five columns
    torch.testing.assert_close(models.values(batch, ForwardConfig()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", ["always", "never"])
@pytest.mark.parametrize("tokens", [1, 14, 40])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_values_do_not_depend_on_chunks_or_padding(form, tokens, share, tokenizer, batch):
    models = build(form, tokenizer)
    batch.input_ids[2, :5] = batch.input_ids[0, :5]  # two answers to one prompt
    ids, attention, mask, forward_config = (
        batch.input_ids,
        batch.attention_mask,
        batch.mask,
        ForwardConfig(tokens, share),
    )
    found = models.values(batch, forward_config)
    expected = models.values(batch, ForwardConfig(1000, "never"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alone = models.values(CompletionBatch(ids[1:2, 3:6], attention[1:2, 3:6], mask[1:2, :1]), forward_config)
    torch.testing.assert_close(found[1, :1], alone[0], atol=1e-5, rtol=1e-5)
    assert (found[~mask] == 0).all() and (found[mask] != 0).all()
    some = models.values(batch, forward_config, torch.tensor([0, 2]))
    assert (some[[1, 3, 4]] == 0).all() and torch.allclose(some[[0, 2]], found[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_sharing_prompts_keeps_the_gradient(form, tokenizer, batch):
    models = build(form, tokenizer)
    batch.input_ids[:, :5], batch.attention_mask[:, :5] = batch.input_ids[0, :5].clone(), 1
    weights = [*trained(models).values(), models.critic.linear.weight]
    gradients = [
        torch.autograd.grad(models.values(batch, ForwardConfig(20, share)).square().mean(), weights, allow_unused=True)
        for share in ("always", "never")
    ]
    for shared, apart in zip(*gradients, strict=True):
        assert (shared is None) == (apart is None)
        if shared is not None:
            scale = apart.abs().max().clamp(min=1)  # large gradients round more
            torch.testing.assert_close(shared / scale, apart / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_value_loss_trains(form, tokenizer, batch):
    models = build(form, tokenizer)
    loss = models.values(batch, ForwardConfig(tokens=18)).sum()
    with torch.no_grad(), models.reference():
        pass  # passes of the reference in between do not stop the gradients
    loss.backward()
    reached = {name for name, p in trained(models).items() if p.grad is not None and p.grad.abs().max() > 0}
    assert models.critic.linear.weight.grad.abs().max() > 0 and reached
    if form == "adapter":
        assert all(".critic." in name for name in reached)
    elif form == "head, lora":
        assert all(".policy." in name for name in reached)


def test_a_critic_with_an_adapter_leaves_policy_and_reference_alone(tokenizer, models, batch):
    shared = build("adapter", tokenizer)
    names = set(trained(shared))
    optimizer = torch.optim.SGD([*trained(shared).values(), *shared.critic.parameters()], lr=0.1)
    with torch.no_grad():
        start = completion_logprobs(models["grouped"], batch, 1.0, PLAIN)
        before = shared.values(batch, PLAIN)
    for _ in range(3):
        optimizer.zero_grad()
        shared.values(batch, PLAIN).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(shared.values(batch, PLAIN), before)
        assert torch.equal(completion_logprobs(shared.policy, batch, 1.0, PLAIN), start)
        assert torch.equal(shared.ref_logprobs(batch, 1.0, PLAIN), start)
        exported = merged(shared.policy)
        torch.testing.assert_close(completion_logprobs(exported, batch, 1.0, PLAIN), start)
    assert set(trained(shared)) == names and {".policy." in name for name in names} == {True, False}


def test_without_options_there_is_no_critic(tokenizer):
    models = PolicyModels(build_model("llama", tokenizer), LORA)
    assert models.critic is None and not models.critic_shares_backbone


def test_an_adapter_needs_a_frozen_base_and_kept_activations(tokenizer):
    for lora, checkpointing, reason in ((None, False, "give model.lora"), (LORA, True, "gradient_checkpointing")):
        with pytest.raises(ValueError, match=f"critic_lora.*{reason}"):
            PolicyModels(build_model("llama", tokenizer), lora, checkpointing, CriticOptions(LORA))
