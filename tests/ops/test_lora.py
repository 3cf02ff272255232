from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from moslim.ops.lora import LoraOptions, add_adapter, add_lora
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier


def llama(layers: int = 1, **options: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, **options)
    return AutoModelForCausalLM.from_config(config)


def test_only_the_adapter_is_trained_and_it_starts_as_nothing() -> None:
    model = llama().eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    adapted = add_lora(model, LoraOptions(rank=2), name="policy").eval()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".policy." in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    torch.testing.assert_close(adapted(ids).logits, before)


def test_named_layers_are_adapted() -> None:
    adapted = add_lora(llama(), LoraOptions(rank=2, target_modules=["down_proj"]), trained_whole=["lm_head"])
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("down_proj" in name or "lm_head" in name for name in trained)
    assert any("lm_head" in name for name in trained)


def test_transposed_layers_of_gpt2_merge_right() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval()
    adapted = add_lora(model, LoraOptions(rank=2)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.tensor([[1, 2, 3]])
    expected = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected)


def adapted_layers(adapted: Any) -> set[str]:
    """Names of the layers that have an adapter, in the model without peft's wrapper."""
    names = [name for name, _ in adapted.get_base_model().named_modules() if name.endswith("lora_A")]
    return {name.removesuffix(".lora_A") for name in names}


EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def last_names(adapted: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in adapted_layers(adapted)}


def test_all_linear_layers_are_the_default_where_peft_has_no_advice() -> None:
    model = llama()
    model.config.model_type = "unheard-of"
    assert last_names(add_lora(model, LoraOptions())) == EVERY
    assert last_names(add_lora(llama(), LoraOptions())) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("wanted", ["all-linear", ["all-linear"]])
def test_all_linear_layers_can_be_named_and_every_adapter_learns(wanted: Any) -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    lfm = AutoConfig.for_model(
        "lfm2", vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    found = [
        (llama(), EVERY),
        (gpt2, {"c_attn", "c_proj", "c_fc"}),
        (
            AutoModelForCausalLM.from_config(lfm),
            {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"},
        ),
    ]
    for model, expected in found:
        adapted = add_lora(model, LoraOptions(rank=2, target_modules=wanted)).eval()
        assert last_names(adapted) == expected
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        ids = torch.tensor([[1, 2, 3, 4]])
        logits = adapted(ids).logits
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits)


def test_heads_of_a_classifier_get_no_adapter() -> None:
    for head_hidden in (None, 4):
        classifier = PreferenceClassifier.from_backbone(
            llama(), PreferenceSet({"tone": ["a", "b"]}), head_hidden=head_hidden
        )
        adapted = add_lora(
            classifier, LoraOptions(rank=2, target_modules="all-linear"), trained_whole=["head", "added"]
        )
        assert all(name.startswith("backbone.") for name in adapted_layers(adapted)) and last_names(adapted) == EVERY
        assert all(p.requires_grad for p in adapted.get_base_model().head.parameters())


def test_a_second_adapter_finds_the_layers_under_the_first() -> None:
    for wanted in (None, "all-linear", ["down_proj", "q_proj"]):
        adapted = add_lora(llama(), LoraOptions(rank=2), name="policy")
        added = add_adapter(adapted, LoraOptions(rank=2, target_modules=wanted), "critic")
        names = {name for name, p in adapted.named_parameters() if any(p is weight for weight in added)}
        expected = {"q_proj", "v_proj"} if wanted is None else EVERY if wanted == "all-linear" else set(wanted)
        assert {name.split(".")[-4] for name in names} == expected and all(".critic." in name for name in names)


def test_a_pattern_fits_whole_names() -> None:
    adapted = add_lora(llama(2), LoraOptions(rank=2, target_modules=r"model\.layers\.1\..*_proj"))
    assert adapted_layers(adapted) == {
        f"model.layers.1.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in EVERY
    }


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (["q_proj", "qproj"], "'qproj' fits no layer.*down_proj, .*v_proj"),
        (["query"], "'query' fits no layer"),
        ("q_proj", "'q_proj' fits no layer"),
        (["norm"], "'norm' fits no layer"),
        (["layers"], "'layers' fits no layer"),
        ([""], "'' fits no layer"),
    ],
)
def test_names_without_a_layer_are_refused_with_those_that_there_are(wanted: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"lora\.target_modules: {named}"):
        add_lora(llama(), LoraOptions(target_modules=wanted))
    with pytest.raises(ValueError, match="'head' fits no layer"):
        classifier = PreferenceClassifier.from_backbone(llama(), PreferenceSet({"tone": ["a", "b"]}))
        add_lora(classifier, LoraOptions(target_modules=["q_proj", "head"]), trained_whole=["head"])


def test_layers_that_share_a_weight_get_no_adapter() -> None:
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=f"{name}' has the same weight as"):
            add_lora(llama(tie_word_embeddings=True), LoraOptions(target_modules=["q_proj", name]))
        assert name in last_names(add_lora(llama(), LoraOptions(target_modules=["q_proj", name]))) or name[0] == "e"


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_mambas_layers_whose_weights_are_read_without_an_adapter_get_none(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    ids = torch.tensor([[1, 2, 3, 4]])
    for wanted, expected in ((None, {"in_proj"}), ("all-linear", {"in_proj"}), (["x_proj"], {"x_proj"})):
        model = AutoModelForCausalLM.from_config(config)
        adapted = add_lora(model, LoraOptions(rank=2, target_modules=wanted)).eval()
        assert last_names(adapted) == expected
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        logits = adapted(ids, use_cache=False).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids, use_cache=False).logits, logits)
    for unread in (["in_proj", "dt_proj"], ".*_proj"):
        with pytest.raises(ValueError, match=r"lora\.target_modules: an adapter on '.*dt_proj' would never be used"):
            add_lora(AutoModelForCausalLM.from_config(config), LoraOptions(target_modules=unread))
