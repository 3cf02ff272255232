"""Adapter folders of peft as models to start from: merged they compute what peft computes, or they are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from moslim.ops.models import load_causal_lm, load_tokenizer
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import is_classifier, load_classifier
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.reward_classifier import RewardClassifier
from moslim.workbench.grammar import build_tokenizer

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 6, 7, 8, 29], [9, 10, 3, 1, 2]])
MASK = torch.ones_like(IDS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TONE = PreferenceSet({"tone": ["bad", "good"]})
QV = ["q_proj", "v_proj"]


def base(folder: Path, kind: type[PreTrainedModel] = LlamaForCausalLM, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config: Any = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    if kind is GPT2LMHeadModel:
        config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)
    if kind is BertForSequenceClassification:
        config = BertConfig(**SMALL)
    model = kind(config).eval()
    model.save_pretrained(folder)
    return kind.from_pretrained(folder)


def trained(model: PreTrainedModel, options: Any, folder: Path) -> Any:
    """An adapter whose every weight differs from its start, saved."""
    adapted = get_peft_model(model, options).eval()
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": QV, "lora_dropout": 0.1, **options})


KINDS = {
    "lora": lora(),
    "all layers": lora(target_modules="all-linear"),
    "pattern": lora(target_modules=r"model\.layers\.\d+\.self_attn\.(q|o)_proj"),
    "some layers": lora(layers_to_transform=[1]),
    "ranks": lora(rank_pattern={"model.layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "head": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "low-rank embeddings": lora(target_modules=[*QV, "embed_tokens"]),
    "low-rank head": lora(target_modules=[*QV, "lm_head"]),
    "some tokens": lora(trainable_token_indices=[5, 29]),
    "norm": lora(modules_to_save=["norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=QV),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_into_its_base_and_computes_the_same(kind: str, tied: bool, tmp_path: Path) -> None:
    adapted = trained(base(tmp_path / "base", tied=tied), KINDS[kind], tmp_path / "adapter")
    assert not torch.allclose(logits(adapted), logits(base(tmp_path / "other", tied=tied)), atol=1e-2)
    found = load_causal_lm(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(found), logits(adapted), **CLOSE)
    assert type(found) is LlamaForCausalLM and all(p.requires_grad for p in found.parameters())
    found.save_pretrained(tmp_path / "export")
    again = load_causal_lm(str(tmp_path / "export"))
    torch.testing.assert_close(logits(again), logits(adapted), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [33, 28])
def test_embeddings_of_added_tokens_come_with_the_adapter(rows: int, tied: bool, tmp_path: Path) -> None:
    model = base(tmp_path / "base", tied=tied)
    model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = trained(model, lora(modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "adapter")
    ids = torch.tensor([[1, 2, rows - 1, 27]])
    found = load_causal_lm(str(tmp_path / "adapter"))
    assert found.config.vocab_size == rows
    torch.testing.assert_close(logits(found, ids), logits(adapted, ids), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_that_were_only_saved_come_with_the_adapter(tied: bool, tmp_path: Path) -> None:
    model = base(tmp_path / "base", tied=tied)
    model.resize_token_embeddings(33, mean_resizing=False)
    adapted = trained(model, lora(), tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 32, 31]])
    torch.testing.assert_close(
        logits(load_causal_lm(str(tmp_path / "adapter")), ids), logits(adapted, ids), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_that_alone_were_trained(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 31, 30]])
    for name, tokens in (("all", [30, 31]), ("one", [31])):
        model = base(tmp_path / "base")
        model.resize_token_embeddings(32, mean_resizing=False)
        adapted = trained(model, lora(trainable_token_indices=tokens), tmp_path / name)
        torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / name)), ids), logits(adapted, ids), **CLOSE)
        without(tmp_path / name, "token_adapter.base_layer")
    assert len(load_causal_lm(str(tmp_path / "all")).get_input_embeddings().weight) == 32
    with pytest.raises(ValueError, match=r"with 32 token embeddings, .* has 30.*all new ones of model\.embed_tokens"):
        load_causal_lm(str(tmp_path / "one"))


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    options = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = trained(base(tmp_path / "base", GPT2LMHeadModel), options, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "adapter"))), logits(adapted), **CLOSE)


def hidden(adapted: Any) -> torch.Tensor:
    """Last hidden states of the transformer under an adapted model."""
    with torch.no_grad():
        return adapted.get_base_model().base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state


BACKBONES = {
    "language model": (LlamaForCausalLM, KINDS["lora"]),
    "all layers": (LlamaForCausalLM, KINDS["all layers"]),
    "pattern": (LlamaForCausalLM, KINDS["pattern"]),
    "some layers": (LlamaForCausalLM, KINDS["some layers"]),
    "ranks": (LlamaForCausalLM, KINDS["ranks"]),
    "patterns of ranks": (
        LlamaForCausalLM,
        lora(
            rank_pattern={r"layers\.0\..*q_proj": 2, r"^model\.layers\.1\..*v_proj": 3},
            alpha_pattern={r"^model\.layers\.1\..*q_proj": 3, r"model\.layers.*v_proj": 5},
        ),
    ),
    "head": (LlamaForCausalLM, KINDS["embeddings"]),
    "classifier": (LlamaForSequenceClassification, lora(task_type="SEQ_CLS")),
    "encoder": (BertForSequenceClassification, lora(target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "no head": (LlamaModel, KINDS["lora"]),
    "no head, patterns": (LlamaModel, lora(alpha_pattern={r"^layers\.1\..*q_proj": 3})),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BACKBONES)
def test_an_adapter_as_backbone_of_a_classifier(kind: str, tmp_path: Path) -> None:
    architecture, options = BACKBONES[kind]
    adapted = trained(base(tmp_path / "base", architecture), options, tmp_path / "adapter")
    classifier = PreferenceClassifier.from_backbone(tmp_path / "adapter", TONE).eval()
    torch.testing.assert_close(
        classifier.states(input_ids=IDS, attention_mask=MASK), hidden(adapted), rtol=1e-4, atol=1e-5
    )
    assert not is_classifier(tmp_path / "adapter")
    classifier.save_pretrained(tmp_path / "export")
    again = load_classifier(tmp_path / "export").eval()
    assert torch.equal(again(IDS, MASK).logits, classifier(IDS, MASK).logits)


def test_the_base_is_where_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = trained(base(tmp_path / "base"), lora(), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    adapter = str(tmp_path / "adapter")
    for load in (load_causal_lm, lambda path: PreferenceClassifier.from_backbone(path, TONE)):
        with pytest.raises(FileNotFoundError, match=r"adapter in '.*/adapter' belongs on .*/base'.*model\.base"):
            load(adapter)
    moved = str(tmp_path / "moved")
    torch.testing.assert_close(logits(load_causal_lm(adapter, base=moved)), logits(adapted), **CLOSE)
    rewrite(tmp_path / "adapter", base_model_name_or_path="../moved")
    torch.testing.assert_close(logits(load_causal_lm(adapter)), logits(adapted), **CLOSE)
    with pytest.raises(ValueError, match=r"is no adapter.*leave out base"):
        load_causal_lm(moved, base=moved)


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    first = trained(base(tmp_path / "base"), lora(), tmp_path / "first").merge_and_unload()
    first.name_or_path = str(tmp_path / "first")
    first.config._name_or_path = str(tmp_path / "first")
    second = trained(first, lora(target_modules=["o_proj"]), tmp_path / "second")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "second"))), logits(second), **CLOSE)


def rewrite(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


WEIGHTS = "adapter_model.safetensors"


def without(folder: Path, name: str, instead: str | None = None) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if name in key)
    tensor = tensors.pop(key)
    if instead is not None:
        tensors[key.replace(name, instead)] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


REFUSED = {
    "lacks a weight": (
        lambda f: without(f, "layers.1.self_attn.q_proj.lora_B"),
        r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B",
    ),
    "a weight without place": (lambda f: without(f, "layers.1", "layers.7"), r"has no place for .*layers\.7"),
    "weights of a score": (
        lambda f: without(f, "model.layers.1.self_attn.v_proj.lora_B", "score"),
        r"no place for score\.weight",
    ),
    "another rank": (lambda f: rewrite(f, r=8), r"another shape .*\(\(4, 16\) instead of \(8, 16\)\)"),
    "unknown layers": (lambda f: rewrite(f, target_modules=["query"]), "does not fit the model"),
    "unknown kind": (lambda f: rewrite(f, peft_type="MAGIC"), "MAGIC|adapter' cannot be loaded"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), r"has no adapter_model\.safetensors"),
    "cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]),
        r"weights in '.*' cannot be read",
    ),
    "no base": (lambda f: rewrite(f, base_model_name_or_path=None), r"names no base model.*model\.base"),
    "itself as base": (lambda f: rewrite(f, base_model_name_or_path=str(f)), "names itself"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "a whole model beside it": (
        lambda f: shutil.copy(f.parent / "base/model.safetensors", f),
        "a whole model and an adapter",
    ),
    "an encoder as base": (
        lambda f: (
            base(f.parent / "bert", BertForSequenceClassification),
            rewrite(f, base_model_name_or_path=str(f.parent / "bert")),
        ),
        "no causal language model",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(fault: str, tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), lora(), tmp_path / "adapter")
    change, message = REFUSED[fault]
    change(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_causal_lm(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lora(lora_bias=True), r"adapter' \(peft_type LORA\) cannot be merged .*lora_bias"),
        (
            VeraConfig(r=4, target_modules=["q_proj"]),
            r"\(peft_type VERA\) has weights that belong to no module.*vera_A",
        ),
    ],
)
def test_a_kind_that_cannot_be_merged_is_named(options: Any, message: str, tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), options, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_causal_lm(str(tmp_path / "adapter"))


def test_a_folder_of_named_adapters_says_which_there_are(tmp_path: Path) -> None:
    named = get_peft_model(base(tmp_path / "base"), lora(), adapter_name="policy")
    named.save_pretrained(tmp_path / "run")
    (tmp_path / "run/adapter_config.json").unlink(missing_ok=True)
    (tmp_path / "run/adapter_model.safetensors").unlink(missing_ok=True)
    for load in (load_causal_lm, load_tokenizer, lambda path: PreferenceClassifier.from_backbone(path, TONE)):
        with pytest.raises(ValueError, match=r"run' holds no model itself, but adapters: .*run/policy'"):
            load(str(tmp_path / "run"))
    assert load_causal_lm(str(tmp_path / "run/policy")).config.vocab_size == 30


def test_prompts_cannot_be_merged(tmp_path: Path) -> None:
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base(tmp_path / "base"), options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"PROMPT_TUNING.*cannot be merged"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_the_tokenizer_is_the_adapters_or_else_its_bases(tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), lora(), tmp_path / "adapter")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = str(tmp_path / "adapter")
    assert load_tokenizer(adapter).get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["mine"])
    tokenizer.save_pretrained(adapter)
    assert "mine" in load_tokenizer(adapter).get_vocab()


def test_modules_start_from_adapters_and_export_whole_models(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)}))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    adapted = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    adapter, moved = str(tmp_path / "adapter"), str(tmp_path / "moved")
    supervised = SupervisedTrainer(model=adapter, base=moved)
    supervised.export(str(tmp_path / "lm"))
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "lm"))), logits(adapted), **CLOSE)
    for place in ("adapter", "moved"):
        with pytest.raises(ValueError, match="this run needs"):
            supervised.export(str(tmp_path / place))
    reward = RewardClassifier(TONE, backbone=adapter, base=moved)
    reward.export(tmp_path / "classifier")
    assert torch.equal(load_classifier(tmp_path / "classifier").head.weight, reward.classifier.head.weight)
    with pytest.raises(ValueError, match=r"model\.base.*which this run needs"):
        reward.export(moved)
