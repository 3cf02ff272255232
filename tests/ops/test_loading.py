"""Models that must not be loaded: weights that are missing, left over, of another shape, damaged or elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from moslim.ops.models import load_causal_lm
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import load_classifier, save_merged
from moslim.reward.modeling import PreferenceClassifier
from moslim.utils.errors import UsageError

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = "model.safetensors"
TONE = PreferenceSet({"tone": ["bad", "good"]})


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def load_backbone(folder: Path) -> PreTrainedModel:
    return PreferenceClassifier.from_backbone(folder, TONE).backbone


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def change(folder: Path, rename: dict[str, str | None], **resized: torch.Tensor) -> Path:
    """Renames weights in a file, drops those without a new name, and puts others in."""
    weights = load_file(folder / WEIGHTS)
    for old, new in rename.items():
        tensor = weights.pop(old)
        if new is not None:
            weights[new] = tensor
    save_file(weights | resized, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **entries: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_loads_with_tied_embeddings_too(tied: bool, tmp_path: Path) -> None:
    model = llama(tied)
    found = load_causal_lm(str(saved(model, tmp_path)))
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    backbone = load_backbone(tmp_path)
    assert torch.equal(backbone.norm.weight, model.model.norm.weight)
    if tied:
        assert found.lm_head.weight is found.model.embed_tokens.weight


FAULTS = {
    "no head": (lambda f: saved(llama().model, f), r"lacks lm_head\.weight.*a model without a head \(LlamaModel\)"),
    "no head, tied": (lambda f: saved(llama(tied=True).model, f), r"is a model without a head \(LlamaModel\)"),
    "sequence classification": (
        lambda f: saved(LlamaForSequenceClassification(LlamaConfig(**SMALL)), f),
        r"lacks lm_head\.weight and has no place in LlamaForCausalLM for score\.weight.*a sequence-classif",
    ),
    "sequence classification, tied": (
        lambda f: saved(LlamaForSequenceClassification(LlamaConfig(**SMALL, tie_word_embeddings=True)), f),
        r"no place in LlamaForCausalLM for score\.weight.*a sequence-classification model",
    ),
    "a layer less": (
        lambda f: configured(saved(llama(), f), num_hidden_layers=1),
        r"no place .*model\.layers\.1\..* 5 more",
    ),
    "a layer more": (lambda f: configured(saved(llama(), f), num_hidden_layers=3), r"lacks model\.layers\.2\."),
    "wider": (
        lambda f: configured(saved(llama(), f), intermediate_size=32),
        r"another shape model\.layers\.0\.mlp\.down_proj\.weight \(16x24 instead of 16x32\)",
    ),
    "other vocabulary": (
        lambda f: configured(saved(llama(), f), vocab_size=31),
        r"lm_head\.weight \(30x16 instead of 31x16\)",
    ),
    "a weight dropped": (
        lambda f: change(saved(llama(), f), {"model.norm.weight": None}),
        r"lacks model\.norm\.weight",
    ),
    "a weight renamed": (
        lambda f: change(saved(llama(), f), {"model.norm.weight": "model.final.weight"}),
        r"lacks model\.norm\.weight and has no place .* for model\.final\.weight",
    ),
    "a value head": (
        lambda f: change(saved(llama(), f), {}, **{"v_head.summary.weight": torch.zeros(1, 16)}),
        r"no place in LlamaForCausalLM for v_head\.summary\.weight",
    ),
    "BERT": (
        lambda f: saved(BertForMaskedLM(BertConfig(**SMALL)), f),
        "no causal language .*encoder with a masked",
    ),
    "a bare BERT": (lambda f: saved(BertModel(BertConfig(**SMALL)), f), r"no causal language model.*\(BertModel\)"),
    "BERT's classifier": (
        lambda f: saved(BertForSequenceClassification(BertConfig(**SMALL)), f),
        "no causal language model.*sequence-classification",
    ),
    "RoBERTa": (lambda f: saved(RobertaForMaskedLM(RobertaConfig(**SMALL)), f), "no causal language model"),
    "XLNet": (
        lambda f: saved(XLNetLMHeadModel(XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=24)), f),
        "no causal language model.*'xlnet'",
    ),
    "encoder and decoder": (
        lambda f: saved(
            T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)), f
        ),
        "no causal language model.*'t5'",
    ),
    "unknown": (lambda f: configured(saved(llama(), f), model_type="lama"), "'.*' cannot be loaded: .*`lama`"),
    "no type": (lambda f: configured(saved(llama(), f), hidden_size="many"), "cannot be loaded: .*hidden_size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_language_model_is_refused_with_names_and_kind(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        SupervisedTrainer(model=str(make(tmp_path)))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_saved_classifier_are_no_language_models(tied: bool, tmp_path: Path) -> None:
    save_merged(PreferenceClassifier.from_backbone(llama(tied), TONE), tmp_path / "c")
    with pytest.raises(ValueError, match=r"is a saved MOSLIM classifier.*model\.classifier"):
        load_causal_lm(str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"part of the saved MOSLIM classifier '.*c'"):
        load_causal_lm(str(tmp_path / "c/backbone"))
    assert load_backbone(tmp_path / "c/backbone").config.hidden_size == 16


def test_a_backbone_leaves_heads_out_but_no_part_of_the_transformer(tmp_path: Path) -> None:
    models = [llama(), LlamaForSequenceClassification(LlamaConfig(**SMALL)), BertForMaskedLM(BertConfig(**SMALL))]
    for number, model in enumerate(models):
        found = load_backbone(saved(model, tmp_path / str(number)))
        own = model.base_model.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.state_dict().items() if name in own)
    with pytest.raises(ValueError, match=r"no place in LlamaModel for .*layers\.1\."):
        load_backbone(configured(tmp_path / "0", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no place in BertModel for .*encoder\.layer\.1\."):
        load_backbone(configured(tmp_path / "2", num_hidden_layers=1))


def test_a_classifier_with_weights_too_many_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    classifier = PreferenceClassifier.from_backbone(llama(), TONE)
    save_merged(classifier, tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps(config | {"dimensions": [["tone", ["a", "b", "c"]]]}))
    with pytest.raises(ValueError, match=r"another shape .*head\.weight \(2x16 instead of 3x16\)"):
        load_classifier(tmp_path / "c")
    config["backbone"]["num_hidden_layers"] = 1
    (tmp_path / "d/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no place in PreferenceClassifier for .*layers\.1\..*Copy or download"):
        load_classifier(tmp_path / "d")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:200], lambda data: data[:-7], lambda data: b"", lambda data: b"<html>"]
)
def test_a_damaged_file_is_named(damage, tmp_path: Path) -> None:
    file = saved(llama(), tmp_path) / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    for load in (load_causal_lm, load_backbone):
        with pytest.raises(ValueError, match=r"the weights in '.*model\.safetensors' cannot be read"):
            load(str(tmp_path))


def shards(folder: Path) -> dict:
    llama().save_pretrained(folder, max_shard_size="8KB")
    return json.loads((folder / f"{WEIGHTS}.index.json").read_text())


@pytest.mark.parametrize("place", ["../{other}", "{root}/{other}", "sub/../../{other}", "..\\{other}", "weights.bin"])
def test_an_index_that_leaves_its_folder_is_refused(place: str, tmp_path: Path) -> None:
    index = shards(tmp_path / "mine")
    first = next(iter(index["weight_map"]))
    name = index["weight_map"][first]
    shutil.copy(tmp_path / "mine" / name, tmp_path / "other.safetensors")
    changed = place.format(root=tmp_path, other="other.safetensors")
    index["weight_map"] = {k: changed if v == name else v for k, v in index["weight_map"].items()}
    (tmp_path / "mine" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    for load in (load_causal_lm, load_backbone):
        with pytest.raises(ValueError, match=r"index\.json' takes the weight .* no safetensors file inside its folder"):
            load(str(tmp_path / "mine"))


def test_embeddings_that_are_not_tied_in_the_file_are_not_said_to_be(tmp_path: Path) -> None:
    model = llama()
    configured(saved(model, tmp_path), tie_word_embeddings=True)
    found = load_causal_lm(str(tmp_path))
    assert torch.equal(found.lm_head.weight, model.lm_head.weight) and not found.config.tie_word_embeddings


OLD = {
    GPT2LMHeadModel: (GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2), "transformer.h.0.attn"),
    GPTJForCausalLM: (
        GPTJConfig(vocab_size=30, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
        "transformer.h.0.attn",
    ),
    GPTNeoForCausalLM: (
        GPTNeoConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]),
        "transformer.h.0.attn.attention",
    ),
    GPTNeoXForCausalLM: (GPTNeoXConfig(**SMALL), "gpt_neox.layers.0.attention"),
}


@pytest.mark.parametrize("kind", OLD)
def test_masks_that_earlier_versions_saved_are_no_weights(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    config, place = OLD[kind]
    model = kind(config)
    mask = {f"{place}.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), f"{place}.masked_bias": torch.tensor(-1e9)}
    change(saved(model, tmp_path), {}, **mask)
    found = load_causal_lm(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))
    assert load_backbone(tmp_path).config.vocab_size == 30
    change(tmp_path, {}, **{f"{place}.other": torch.zeros(1)})
    for load in (load_causal_lm, load_backbone):
        with pytest.raises(ValueError, match=rf"has no place in \w+ for \S*{place}\.other, so"):
            load(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_named(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    model.model.norm.weight.data.fill_(6e4)  # whose sum is infinite in float16
    load_causal_lm(saved(model, tmp_path / "large"), dtype=dtype)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = number
    saved(model, tmp_path / "lm")
    for load in (lambda path: load_causal_lm(path, dtype=dtype), load_backbone):
        with pytest.raises(ValueError, match=r"lm' has weights that are not finite .*: \S*layers\.1\.mlp\.up_proj"):
            load(tmp_path / "lm")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_numbers_of_a_quantised_model_need_its_configuration(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"numbers of a quantised model, {name} .*no quantization_config"):
        load_causal_lm(str(folder))


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="4KB")
    saved(llama(), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"two sets of weights, model\.safetensors and the shards of"):
        load_causal_lm(str(tmp_path))


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1,')
    with pytest.raises(ValueError, match=r"generation_config\.json' is no JSON"):
        load_causal_lm(str(tmp_path))


def test_a_backbone_that_reads_no_texts_or_loads_as_another_is_refused(tmp_path: Path) -> None:
    images = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    with pytest.raises(ValueError, match=r"vit' \(ViTModel\) does not read texts"):
        load_backbone(saved(ViTModel(images), tmp_path / "vit"))
    encoder = T5EncoderModel(T5Config(vocab_size=30, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))
    with pytest.raises(ValueError, match=r"^backbone 'T5EncoderModel' .*a part of one"):
        PreferenceClassifier.from_backbone(encoder, TONE)
    with pytest.raises(ValueError, match=r"the encoder of a model that has a decoder, too \(T5EncoderModel\)"):
        load_backbone(saved(encoder, tmp_path / "t5"))


def test_the_index_of_a_saved_classifier_is_checked_too(tmp_path: Path) -> None:
    save_merged(PreferenceClassifier.from_backbone(llama(), TONE), tmp_path / "c")
    (tmp_path / "c/backbone" / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    file = tmp_path / "c" / f"{WEIGHTS}.index.json"
    file.write_text(file.read_text().replace(f"backbone/{WEIGHTS}", "../elsewhere.safetensors"))
    with pytest.raises(ValueError, match=r"from '\.\./elsewhere\.safetensors'"):
        load_classifier(tmp_path / "c")


@pytest.mark.parametrize("content", ["[1]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_malformed_index_is_named(content: str, tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json'"):
        load_causal_lm(str(tmp_path))


def test_shards_in_their_folder_load_and_a_missing_one_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    assert torch.equal(load_causal_lm(str(tmp_path)).lm_head.weight, llama().lm_head.weight)
    name = index["weight_map"]["model.norm.weight"]
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_causal_lm(str(tmp_path))
