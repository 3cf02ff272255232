import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5Model,
)

from moslim.ops.loading import is_causal
from moslim.ops.models import checkpoint_activations
from moslim.preferences import PreferenceSet
from moslim.reward.heads import LINKS, LinkName
from moslim.reward.modeling import PreferenceClassifier, PreferenceClassifierConfig

PREFERENCES = PreferenceSet({"zeal": ["no", "yes"], "calm": ["a", "b", "c", "d", "e", "f", "g"]})
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1),
    "bert": BertConfig(**SMALL),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def language_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    return auto.from_config(CONFIGS[kind])


@pytest.fixture(params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_backbone_weights_come_from_the_folder_of_a_language_model(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    model.save_pretrained(tmp_path)
    classifier = PreferenceClassifier.from_backbone(tmp_path, PREFERENCES)
    expected = dict(model.base_model.named_parameters())
    for name, parameter in classifier.backbone.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_saved_classifier_reloads_exactly_with_its_order_of_dimensions(kind: str, tmp_path: Path) -> None:
    classifier = PreferenceClassifier.from_backbone(language_model(kind), PREFERENCES, max_length=30).eval()
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is PreferenceClassifier
    assert again.preferences == PREFERENCES
    assert again.config.pair_length == 30
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    assert torch.equal(classifier(IDS, MASK).logits, again(IDS, MASK).logits)


def test_pooling_is_last_token_of_decoders_and_masked_mean_of_encoders(kind: str) -> None:
    model = language_model(kind).eval()
    hidden = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    expected = hidden[[0, 1], [3, 1]]
    if kind == "bert":
        expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    classifier = PreferenceClassifier.from_backbone(model, PREFERENCES).eval()
    torch.testing.assert_close(classifier.features(IDS, MASK), expected)


def test_padding_changes_nothing(kind: str) -> None:
    classifier = PreferenceClassifier.from_backbone(language_model(kind), PREFERENCES).eval()
    alone = classifier.probabilities(IDS[1:, :2], MASK[1:, :2])
    torch.testing.assert_close(classifier.probabilities(IDS, MASK)[1:], alone)


def test_each_head_has_its_own_softmax_over_its_own_levels() -> None:
    classifier = PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES).eval()
    logits, probs = classifier(IDS, MASK).logits, classifier.probabilities(IDS, MASK)
    flat = classifier.head(classifier.features(IDS, MASK))
    assert logits.shape == (2, 2, 7)
    assert torch.equal(logits[:, 0, :2], flat[:, :2]) and torch.equal(logits[:, 1], flat[:, 2:])
    assert (logits[:, 0, 2:] == -torch.inf).all() and (probs[:, 0, 2:] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 2))


def test_every_parameter_gets_a_gradient_and_checkpointing_gives_the_same(kind: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(1)
        classifier = PreferenceClassifier.from_backbone(language_model(kind), PREFERENCES).train()
        for module in classifier.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_activations(classifier)
        classifier(IDS, MASK).logits[:, 1].square().sum().backward()
        return {name: p.grad for name, p in classifier.named_parameters()}

    plain, saved = gradients(False), gradients(True)
    assert [name for name, grad in plain.items() if grad is None] == []  # one without would stop DDP
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name])


@pytest.mark.parametrize("hidden", [None, 6], ids=["linear", "mlp"])
@pytest.mark.parametrize("link", list(LINKS))
def test_every_kind_of_head_reloads_exactly_and_trains_whole(
    link: LinkName, hidden: int | None, tmp_path: Path
) -> None:
    options = {"link": link, "head_hidden": hidden, "head_dropout": 0.5}
    classifier = PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES, **options).eval()
    classifier.save_pretrained(tmp_path)
    again = PreferenceClassifier.from_pretrained(tmp_path).eval()
    found, expected = again(IDS, MASK), classifier(IDS, MASK)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.scores, expected.scores)
    torch.testing.assert_close(again.probabilities(IDS, MASK).sum(-1), torch.ones(2, 2))
    (found.logits[:, 0, :2].square().sum() + found.logits[:, 1].square().sum()).backward()
    assert [name for name, p in again.named_parameters() if p.grad is None] == []


def test_heads_of_their_own_are_found_by_the_name_of_their_dimension() -> None:
    classifier = PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES, head_hidden=6).eval()
    features = classifier.features(IDS, MASK)
    assert {name.split(".")[1] for name in classifier.state_dict() if name.startswith("head.")} == {"zeal", "calm"}
    assert torch.equal(classifier.classify(features).logits[:, 1], classifier.head["calm"](features))
    with pytest.raises(ValueError, match="name of dimension 'values' cannot be"):
        awkward = PreferenceSet({"values": ["no", "yes"]})
        PreferenceClassifier.from_backbone(language_model("llama"), awkward, head_hidden=6)


def test_classifier_saved_before_there_were_kinds_of_heads_still_loads(tmp_path: Path) -> None:
    classifier = PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES).eval()
    classifier.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in ("link", "head_hidden", "head_dropout", "temperatures"):
        saved.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = PreferenceClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS, MASK).logits, classifier(IDS, MASK).logits)


def test_temperatures_are_saved_and_applied_in_evaluation_only(tmp_path: Path) -> None:
    classifier = PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES).eval()
    plain = classifier(IDS, MASK).logits
    classifier.config.temperatures = [2.0, 0.5]
    classifier.save_pretrained(tmp_path)
    again = PreferenceClassifier.from_pretrained(tmp_path).eval()
    found = again(IDS, MASK)
    torch.testing.assert_close(found.logits, plain / torch.tensor([2.0, 0.5])[:, None])
    assert torch.equal(found.scores, plain) and torch.equal(found.logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(again.probabilities(IDS, MASK), found.logits.softmax(-1))
    assert torch.equal(again.train()(IDS, MASK).logits, plain)


def test_configuration_of_heads_is_checked() -> None:
    with pytest.raises(ValueError, match="link 'logit' is unknown: give one of softmax, corn, regression"):
        PreferenceClassifierConfig(link="logit")
    with pytest.raises(ValueError, match=r"temperatures is \[.*\], for 2 dimensions: give one each"):
        PreferenceClassifierConfig(dimensions=[["a", ["0", "1"]], ["b", ["0", "1"]]], temperatures=[1.0])


@pytest.mark.parametrize("change", ["dropped", "renamed"])
def test_loading_without_a_head_tensor_names_it(change: str, tmp_path: Path) -> None:
    PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights.pop("head.weight")
    if change == "renamed":
        weights["score.weight"] = head
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"head\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_backbone_folder_without_a_weight_names_it(tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight"):
        PreferenceClassifier.from_backbone(tmp_path, PREFERENCES)


def test_making_a_classifier_leaves_the_given_model_as_it_was() -> None:
    model = language_model("llama").eval()
    before = model(IDS).logits
    PreferenceClassifier.from_backbone(model, PREFERENCES)
    assert torch.equal(model(IDS).logits, before)


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        PreferenceClassifier.from_backbone(T5Model(config), PREFERENCES)


def test_config_names_every_output(tmp_path: Path) -> None:
    PreferenceClassifier.from_backbone(language_model("llama"), PREFERENCES).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["id2label"]["1"] == "zeal: yes" and saved["id2label"]["8"] == "calm: g"


def test_decoders_that_look_both_ways_are_told_apart():
    assert [name for name, config in CONFIGS.items() if not is_causal(config)] == ["bert"]
    assert is_causal(Gemma3TextConfig()) and not is_causal(Gemma3TextConfig(use_bidirectional_attention=True))
    assert not is_causal(LlamaConfig(**SMALL, is_causal=False))
