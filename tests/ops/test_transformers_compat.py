"""Each private interface in moslim.training.lightning_compat still exists and does what its docstring says."""

import json

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moslim.ops import transformers_compat as compat

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def expect(condition: bool, interface: str) -> None:
    """Fails with the interface that is gone or has changed."""
    assert condition, f"{interface} is gone or has changed: mend its user in src/moslim/ops/transformers_compat.py"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_attention_of_a_model(name):
    config = LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    found = compat.attention_implementation(model.config.get_text_config())
    expect(found == name, "transformers' PreTrainedConfig._attn_implementation")


def test_a_model_computes_with_another_attention(llama):
    calls = []

    def noted(*args, **kwargs):
        calls.append(1)
        return compat.sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("noted", noted)
    tokens = torch.tensor([[1, 2, 3]])
    before = llama.config._attn_implementation
    with compat.attention_replaced(llama.config.get_text_config(), "noted"):
        found = llama(tokens).logits
    interface = "transformers' PreTrainedConfig._attn_implementation, read in every forward pass,"
    expect(len(calls) == SIZES["num_hidden_layers"], interface)
    assert llama.config._attn_implementation == before
    interface = "transformers.integrations.sdpa_attention.sdpa_attention_forward, an attention function,"
    expect(torch.allclose(found, llama(tokens).logits), interface)


def test_the_attention_comes_back_after_an_error(llama):
    with pytest.raises(RuntimeError, match="planned"), compat.attention_replaced(llama.config, "noted"):
        raise RuntimeError("planned")
    assert llama.config._attn_implementation == "sdpa"


def test_a_stateful_model_says_so(llama):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    expect(compat.is_stateful(mamba), "transformers' PreTrainedModel._is_stateful of Mamba")
    expect(not compat.is_stateful(llama), "transformers' PreTrainedModel._is_stateful of Llama")


def test_the_blocks_of_a_model(llama):
    kinds = {type(layer).__name__ for layer in llama.model.layers}
    expect(compat.block_kinds(llama) == kinds, "transformers' PreTrainedModel._no_split_modules")
    assert compat.block_kinds(nn.Linear(1, 1)) is None


def test_a_missing_file_is_no_error(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    expect(
        compat.found_file(str(tmp_path), "absent.json") is None,
        "The argument _raise_exceptions_for_missing_entries of transformers' cached_file",
    )
    assert compat.found_file(str(tmp_path), "there.json") == str(tmp_path / "there.json")


def test_settings_do_not_depend_on_the_place(llama, tmp_path):
    found = []
    for name in ("one", "two"):
        llama.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"transformers_version": name}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).config)
    expect("_name_or_path" in found[0].to_dict(), 'The entry "_name_or_path" of a transformers configuration')
    settings = [compat.own_settings(config) for config in found]
    expect(settings[0] == settings[1], "What a transformers configuration says of its files")
    assert settings[0]["hidden_size"] == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("table", "model_type", "name"),
    [
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "llama", "LlamaForCausalLM"),
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "bert", "BertForMaskedLM"),
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "llava", "LlavaForConditionalGeneration"),
    ],
)
def test_class_names_by_model_type(table, model_type, name):
    found = getattr(compat, table, {}).get(model_type)
    expect(found == name, f"transformers.models.auto.modeling_auto.{table}")


def test_liger_takes_its_options(monkeypatch, llama):
    liger = pytest.importorskip("transformers.integrations.liger")
    expect(hasattr(liger, "apply_liger_kernel"), "transformers.integrations.liger.apply_liger_kernel")
    calls = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, config: calls.append((model, config)))
    compat.apply_liger(llama)
    assert calls == [(llama, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_default_layers_of_an_adapter():
    table = "peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    expect(compat.lora_targets("llama") == ["q_proj", "v_proj"], table)
    assert compat.lora_targets("no such model") is None


def test_patterns_of_an_adapter():
    found = [compat.matching_pattern(["q_proj", "layers.1.*"], name) for name in ("layers.0.q_proj", "layers.0.v_proj")]
    expect(found == ["q_proj", "layers.0.v_proj"], "peft.utils.other.get_pattern_key")


@pytest.mark.parametrize("method", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_module(method):
    layer = nn.Linear(1, 1)
    assert not compat.has_forward_hooks(layer)
    handle = getattr(layer, method)(lambda *args: None)
    expect(compat.has_forward_hooks(layer), "torch's Module._forward_hooks or Module._forward_pre_hooks")
    handle.remove()
    assert not compat.has_forward_hooks(layer)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_packed_product():
    operators = "torch.ops.mkldnn._linear_pointwise or _reorder_linear_weight"
    expect(compat.can_pack_linear(), operators)
    weight, states = torch.randn(40, 16), torch.randn(3, 16)
    product = compat.packed_linear(weight, 4)
    expect(torch.allclose(product(states), states @ weight.T, atol=1e-5), operators)
