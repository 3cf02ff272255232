import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from moslim.lora import LoraOptions, add_lora


def llama() -> PreTrainedModel:
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
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


def test_unknown_architecture_asks_for_layers() -> None:
    model = llama()
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match=r"unheard-of.*lora\.target_modules"):
        add_lora(model, LoraOptions())
