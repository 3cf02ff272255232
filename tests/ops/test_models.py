import json

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from moslim.ops.lora import LoraOptions, add_lora
from moslim.ops.models import (
    Architecture,
    PretrainedTokenizer,
    WorkbenchTokenizer,
    align,
    eos_ids,
    fuse_kernels,
    load_causal_lm,
    load_tokenizer,
)
from moslim.workbench.grammar import build_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Architecture("llama", WorkbenchTokenizer(), SMALL).build(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_weights_are_aligned_where_they_lie():
    layer = torch.nn.Linear(3, 5)
    weight = layer.weight.detach().clone()
    layer.weight.data = torch.empty(16)[1:].view(5, 3).copy_(weight)
    bias = layer.bias.data_ptr()
    align(layer)
    assert layer.weight.data_ptr() % 64 == 0 and torch.equal(layer.weight, weight) and layer.bias.data_ptr() == bias


def test_an_architecture_takes_vocabulary_and_special_ids_from_the_tokenizer(tokenizer):
    model = Architecture("llama", WorkbenchTokenizer(), SMALL).build(tokenizer)
    assert isinstance(model, LlamaForCausalLM) and model.config.hidden_size == 16
    assert model.config.vocab_size == model.get_output_embeddings().out_features == len(tokenizer)
    found = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert found == (tokenizer.pad_token_id, None, tokenizer.eos_token_id)


def test_random_weights_follow_from_the_seed(tokenizer):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = Architecture("gpt2", WorkbenchTokenizer(), {"n_embd": 16, "n_layer": 1, "n_head": 2}).build(tokenizer)
        heads.append(model.lm_head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_tokenizers_from_a_folder_and_from_the_world(tokenizer, folder):
    text = "How do I clean a kettle?"
    for found in (PretrainedTokenizer(str(folder)).load(), WorkbenchTokenizer().load(), load_tokenizer(str(folder))):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert found.chat_template == tokenizer.chat_template and found.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_from_a_folder(folder, dtype):
    model = load_causal_lm(str(folder), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    original = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight.to(dtype))


def test_pickled_weights_are_refused(folder, tmp_path):
    model = load_causal_lm(str(folder))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pytorch_model\.bin' are a pickle.*save them as safetensors"):
        load_causal_lm(str(tmp_path))


def test_code_from_a_folder_does_not_run(folder, tmp_path):
    configuration = json.loads((folder / "config.json").read_text())
    configuration |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [2]), (2, [2]), (7, [2, 7]), ([9, 7], [2, 7, 9]), ([2, 7], [2, 7])]
)
def test_every_token_that_ends_an_answer(folder, tokenizer, configured, expected):
    model = load_causal_lm(str(folder))
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert tokenizer.eos_token_id == 2 and eos_ids(model, tokenizer) == expected


def test_end_tokens_of_an_adapted_model_and_of_one_without_generation_config(folder, tokenizer):
    model = load_causal_lm(str(folder))
    model.generation_config.eos_token_id = [5, 2]
    assert eos_ids(add_lora(model, LoraOptions(rank=2)), tokenizer) == [2, 5]
    assert eos_ids(torch.nn.Linear(1, 1), tokenizer) == [2]
    tokenizer_without = load_tokenizer(str(folder))
    tokenizer_without.eos_token = None
    assert eos_ids(model, tokenizer_without) == [2, 5]


def test_an_unknown_architecture_is_named(tokenizer):
    with pytest.raises(ValueError, match="lama3"):
        Architecture("lama3", WorkbenchTokenizer()).build(tokenizer)


def test_fused_kernels_say_what_they_lack(folder, monkeypatch):
    model = load_causal_lm(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model\.liger.* CUDA"):
        fuse_kernels(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("moslim.ops.models.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moslim\[liger\]'"):
        fuse_kernels(model)


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"there is no folder 'outputs/mine/model'.*still to be run"):
            load("outputs/mine/model")
        with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here, and the Hub gives no"):
            load("nobody/nothing")
