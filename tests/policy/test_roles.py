import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moslim.generation.torch_engine import TorchEngine
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import LoraOptions
from moslim.policy.policy_models import PolicyModels, evaluating
from tests.helpers.policy_models import build_model

LORA = LoraOptions(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
BOTH = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture
def batch(tokenizer):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, len(tokenizer), (6, 9), generator=generator)
    return ids, torch.ones_like(ids), torch.arange(4) < torch.tensor([4, 1, 2, 4, 3, 3])[:, None]


def logprobs(model, batch):
    ids, attention, mask = batch
    whole = CompletionBatch(ids, torch.cat([attention[:, :5], mask.long()], dim=1), mask)
    return completion_logprobs(model, whole, 1.0, ForwardConfig(tokens=32))


def train(models, batch, steps=3):
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logprobs(models.policy, batch).sum().backward()
        optimizer.step()


@BOTH
@torch.no_grad()
def test_at_first_policy_and_reference_are_the_start(models, tokenizer, batch, lora):
    start = logprobs(models["grouped"], batch)
    models = PolicyModels(build_model("grouped", tokenizer), lora)
    assert models.adapted == (lora is not None)
    assert torch.equal(logprobs(models.policy, batch), start)
    with models.reference() as reference:
        assert torch.equal(logprobs(reference, batch), start)


@BOTH
def test_the_reference_stays_exactly_the_start_while_the_policy_learns(models, tokenizer, batch, lora):
    shared = PolicyModels(build_model("grouped", tokenizer), lora)
    frozen = {name: value.clone() for name, value in shared.frozen().items()}
    train(shared, batch)
    with torch.no_grad():
        start, learnt = logprobs(models["grouped"], batch), logprobs(shared.policy, batch)
        with shared.reference() as reference:
            assert torch.equal(logprobs(reference, batch), start)
        assert torch.equal(logprobs(shared.policy, batch), learnt) and (learnt - start).abs().max() > 1e-3
    assert frozen.keys() == shared.frozen().keys()
    assert all(torch.equal(value, frozen[name]) for name, value in shared.frozen().items())


@BOTH
def test_only_what_is_trained_has_gradients(tokenizer, lora):
    models = PolicyModels(build_model("llama", tokenizer), lora)
    trained = {name for name, p in models.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained) == (lora is not None)
    assert not trained & models.frozen().keys() or lora is None
    with models.reference() as reference:
        assert not any(p.requires_grad for p in reference.parameters())


def test_the_adapter_is_on_again_after_an_error(tokenizer, batch):
    models = PolicyModels(build_model("llama", tokenizer), LORA)
    train(models, batch)
    with torch.no_grad():
        learnt = logprobs(models.policy, batch)
        with pytest.raises(ZeroDivisionError), models.reference():
            _ = 1 / 0
        assert torch.equal(logprobs(models.policy, batch), learnt)
    assert any(p.requires_grad for p in models.policy.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_pass_between_forward_and_backward_leaves_the_gradients(tokenizer, batch, checkpointing):
    models = PolicyModels(build_model("llama", tokenizer), LORA, checkpointing)
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    expected = torch.autograd.grad(logprobs(models.policy, batch).sum(), trained)
    loss = logprobs(models.policy, batch).sum()
    with models.reference() as reference, torch.no_grad():
        logprobs(reference, batch)
    loss.backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(trained, expected, strict=True))
    assert any(p.grad.abs().max() > 0 for p in trained)


DROPOUTS = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_embd": 16, "n_head": 2},
    "llama": {"attention_dropout": 0.5, "intermediate_size": 24},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5, "parallel_attn": False},
}


@pytest.mark.parametrize("kind", DROPOUTS)
def test_no_architecture_drops_anything_even_in_training_mode(kind):
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **DROPOUTS[kind]}))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert not torch.equal(copy.deepcopy(model).train()(ids).logits, expected)  # it would drop
        assert torch.equal(PolicyModels(model, None).policy.train()(ids).logits, expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_the_mode(training):
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train(training)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training == training for module in model.modules())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("kind", ["grouped", "gpt2"])
@BOTH
def test_gradient_checkpointing_changes_memory_alone(tokenizer, batch, prompts, kind, lora):
    if lora and kind == "gpt2":
        lora = LoraOptions(rank=4, alpha=8.0, target_modules=["c_attn"])
    found, forward_config = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # of the adapter's weights
        models = PolicyModels(build_model(kind, tokenizer), lora, checkpointing)
        train(models, batch, steps=1)
        mlp = next(module for name, module in models.policy.named_modules() if name.endswith("mlp"))
        counted = mlp.register_forward_pre_hook(lambda *_: forward_config.append(1))
        values = logprobs(models.policy, batch)
        trained = [p for p in models.policy.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(values.sum(), trained)
        counted.remove()
        with evaluating(models.policy):
            answers = TorchEngine(8).sample(models.policy, *prompts, torch.arange(10).reshape(5, 2), [2], 0)
        found.append((values.detach(), *gradients, answers.tokens, answers.logprobs))
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)
    assert len(forward_config) == 2 + 2 * 2  # two chunks, and each of them again in the backward pass
