"""Which models can be taken apart."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moslim.ops.chunked_linear import Head, Predictor, last_layer
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import LoraOptions, add_lora
from moslim.ops.models import checkpoint_activations
from tests.helpers.policy_models import ARCHITECTURES, SMALL, build_model

BIASED = {"phi": {}, "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}}
CHANGED = {  # and the scale and cap that its logits then have
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "cohere": ({"logit_scale": 0.3}, (0.3, None)),
    "granite": ({"logits_scaling": 3.0}, (1 / 3, None)),
}


def build(model_type, options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SMALL, "num_key_value_heads": 2, **options})
    ).eval()


@pytest.fixture(scope="module")
def batch():
    """Two prompts, three answers each."""
    ids = torch.randint(1, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    ids[1:3, :4], ids[4:, :4] = ids[0, :4], ids[3, :4]
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    prompt = torch.arange(4) >= torch.tensor([0, 0, 0, 2, 2, 2])[:, None]
    return CompletionBatch(ids, torch.cat([prompt, mask], dim=1).long(), mask)


def assert_equal_to_plain(model, batch):
    plain = completion_logprobs(model, batch, 0.8, ForwardConfig(share_prefixes="never", chunked_logprobs=False))
    wanted = torch.autograd.grad(plain.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for share in ("always", "never"):
        found = completion_logprobs(model, batch, 0.8, ForwardConfig(tokens=16, share_prefixes=share))
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad(
            found.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        for one, two in zip(gradients, wanted, strict=True):
            assert (one is None) == (two is None)
            if two is not None:
                assert (one - two).norm() <= 1e-5 * max(1.0, float(two.norm()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_usual_architectures_can_be_taken_apart(models, kind):
    head = last_layer(models[kind])
    assert head == Head(models[kind].get_output_embeddings())
    ids = torch.tensor([[7, 8, 9]])
    states = Predictor(models[kind], chunked=True).states(2, input_ids=ids)
    torch.testing.assert_close(head(states), models[kind](input_ids=ids).logits[:, -2:])


@pytest.mark.parametrize("kind", BIASED)
def test_a_last_layer_with_a_bias(kind, batch):
    model = build(kind, BIASED[kind])
    head = last_layer(model)
    assert head is not None
    torch.nn.init.normal_(head.layer.bias)
    assert_equal_to_plain(model, batch)


@pytest.mark.parametrize("kind", CHANGED)
def test_logits_are_capped_or_scaled_as_the_model_does(kind, batch):
    options, then = CHANGED[kind]
    model = build(kind, options)
    head = last_layer(model)
    assert head is not None and (head.scale, head.softcap) == then
    assert_equal_to_plain(model, batch)


def test_what_the_configuration_does_not_say_is_left_to_the_model(batch):
    model = build("gemma2", CHANGED["gemma2"][0])
    model.config.final_logit_softcapping = None
    inner = model.forward
    model.forward = lambda **inputs: _halved(inner(**inputs))
    assert last_layer(model) is None and Predictor(model, chunked=True).head is None
    assert_equal_to_plain(model, batch)


def _halved(output):
    output.logits = output.logits / 2
    return output


def test_a_scaled_input_of_the_last_layer_is_noticed():
    model = build("llama", {})
    inner = model.forward

    def forward(**inputs):
        model.model.norm.weight.data *= 2
        try:
            return inner(**inputs)
        finally:
            model.model.norm.weight.data /= 2

    model.forward = forward
    assert last_layer(model) is None


def test_a_hook_or_an_adapter_on_the_last_layer(tokenizer, batch):
    model = build("llama", {})
    assert last_layer(model) is not None
    handle = model.lm_head.register_forward_hook(lambda _, __, out: 2 * out)
    assert last_layer(model) is None
    assert_equal_to_plain(model, batch)
    handle.remove()
    assert last_layer(model) is not None
    adapted = add_lora(model, LoraOptions(rank=2, alpha=4.0, target_modules=["q_proj", "lm_head"]))
    assert last_layer(adapted) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_elsewhere(kind, tokenizer, batch):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    model = add_lora(build_model(kind, tokenizer), LoraOptions(rank=2, alpha=4.0, target_modules=targets))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    assert last_layer(model) is not None
    assert_equal_to_plain(model, batch)
    with model.disable_adapter():
        without = completion_logprobs(model, batch, 1.0, ForwardConfig(share_prefixes="always"))
    assert (without - completion_logprobs(model, batch, 1.0, ForwardConfig())).abs().max() > 0.01


def test_activations_that_are_computed_twice(tokenizer, batch):
    model = build_model("llama", tokenizer)
    checkpoint_activations(model)
    assert_equal_to_plain(model.train(), batch)
