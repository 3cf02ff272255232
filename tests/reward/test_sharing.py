from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from moslim.ops.lora import LoraOptions, add_lora, merged
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import is_classifier, load_classifier, save_adapter, save_merged
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.scorer import Scorer
from moslim.utils.folders import whole_folder
from tests.helpers.word_task import save_backbone

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 2], [9, 10, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture
def classifier(preferences: PreferenceSet, backbone: str) -> PreferenceClassifier:
    torch.manual_seed(0)
    return PreferenceClassifier.from_backbone(backbone, preferences, max_length=30).eval()


@pytest.fixture
def adapted(classifier: PreferenceClassifier) -> torch.nn.Module:
    """A classifier with an adapter that changes something."""
    model = add_lora(classifier, LoraOptions(rank=2, target_modules=["q_proj", "down_proj"]), trained_whole=["head"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def rewrite(file: Path, missing: str, renamed: str | None) -> None:
    """Takes a tensor out of a file, or gives it another name."""
    weights = load_file(file)
    tensor = weights.pop(missing)
    if renamed is not None:
        weights[renamed] = tensor
    save_file(weights, file, metadata={"format": "pt"})


# --- merged form


def test_merged_form_is_one_model_and_stores_no_weight_twice(classifier: PreferenceClassifier, tmp_path: Path) -> None:
    save_merged(classifier, tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is PreferenceClassifier and again.preferences == classifier.preferences
    assert again.config.pair_length == 30 and again.dtype == torch.float32
    state = classifier.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    stored = sum(tensor.numel() for file in tmp_path.rglob("*.safetensors") for tensor in load_file(file).values())
    assert stored == sum(tensor.numel() for tensor in state.values())


def test_backbone_of_the_merged_form_is_a_plain_model(classifier: PreferenceClassifier, tmp_path: Path) -> None:
    save_merged(classifier, tmp_path)
    plain = AutoModel.from_pretrained(tmp_path / "backbone")
    assert type(plain) is type(classifier.backbone)
    torch.testing.assert_close(plain(IDS, MASK).last_hidden_state, classifier.backbone(IDS, MASK).last_hidden_state)


@pytest.mark.parametrize("renamed", [None, "score.weight"])
@pytest.mark.parametrize(
    ("file", "key"), [("heads.safetensors", "head.weight"), ("backbone/model.safetensors", "norm.weight")]
)
def test_merged_form_without_a_tensor_names_it(
    file: str, key: str, renamed: str | None, classifier: PreferenceClassifier, tmp_path: Path
) -> None:
    save_merged(classifier, tmp_path)
    rewrite(tmp_path / file, key, renamed)
    for load in (load_classifier, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match=key):
            load(tmp_path)


def test_an_earlier_export_leaves_no_weights_behind(
    classifier: PreferenceClassifier, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    PreferenceClassifier.from_backbone(backbone, preferences).save_pretrained(tmp_path)  # with model.safetensors
    save_merged(classifier, tmp_path)
    assert torch.equal(load_classifier(tmp_path).head.weight, classifier.head.weight)
    adapted = add_lora(classifier, LoraOptions(rank=2, target_modules=["q_proj"]))
    save_adapter(adapted, backbone, tmp_path)
    assert not (tmp_path / "backbone").exists() and not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(load_classifier(tmp_path).head.weight, classifier.head.weight)


def test_an_export_takes_its_place_whole_and_leaves_no_tokenizer_behind(tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / ".part-killed").mkdir()
    with pytest.raises(OSError, match="disk"), whole_folder(tmp_path, is_classifier) as part:
        (part / "tokenizer.json").write_text("half")
        raise OSError("disk full")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "chat_template.jinja": "old",
        "tokenizer.json": "old",
        "notes.txt": "old",
    }
    with whole_folder(tmp_path, is_classifier) as part:
        (part / "tokenizer.json").write_text("new")
    (tmp_path / "checksums.json").unlink()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"tokenizer.json": "new", "notes.txt": "old"}


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_loaded_weights_are_aligned(form: str, adapted: torch.nn.Module, backbone: str, tmp_path: Path) -> None:
    save_adapter(adapted, backbone, tmp_path) if form == "adapter" else save_merged(merged(adapted), tmp_path)
    assert not [name for name, p in load_classifier(tmp_path).named_parameters() if p.data_ptr() % 64]


def test_the_folder_of_another_model_is_not_overwritten(classifier: PreferenceClassifier, tmp_path: Path) -> None:
    save_backbone(tmp_path, seed=0)
    with pytest.raises(ValueError, match="holds another model"):
        save_merged(classifier, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


# --- adapter form


def test_adapter_form_gives_the_same_probabilities(
    adapted: torch.nn.Module, backbone: str, preferences: PreferenceSet, tmp_path: Path
) -> None:
    save_adapter(adapted, backbone, tmp_path)
    expected = adapted.probabilities(IDS, MASK)
    again = load_classifier(tmp_path)
    assert again.preferences == preferences and not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not any("lora" in name for name, _ in again.named_parameters())
    torch.testing.assert_close(again.probabilities(IDS, MASK), expected)
    untrained = PreferenceClassifier.from_backbone(backbone, preferences).eval()
    untrained.head.load_state_dict(again.head.state_dict())
    assert not torch.allclose(untrained.probabilities(IDS, MASK), expected)  # the adapter does matter


def test_adapter_on_the_backbone_of_a_saved_classifier(
    adapted: torch.nn.Module, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    base = PreferenceClassifier.from_backbone(backbone, preferences)
    save_merged(base, tmp_path / "base")
    save_adapter(adapted, str(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(
        load_classifier(tmp_path / "adapter").probabilities(IDS, MASK), adapted.probabilities(IDS, MASK)
    )


def test_a_moved_base_is_found_where_one_says(adapted: torch.nn.Module, backbone: str, tmp_path: Path) -> None:
    save_adapter(adapted, "gone/model", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"(?s)base model 'gone/model', which cannot be loaded .* base="):
        load_classifier(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    scorer = Scorer(tmp_path, base=backbone)
    torch.testing.assert_close(scorer.classifier.probabilities(IDS, MASK), adapted.probabilities(IDS, MASK))


def test_another_base_is_refused(adapted: torch.nn.Module, backbone: str, tmp_path: Path) -> None:
    save_adapter(adapted, backbone, tmp_path / "adapter")
    save_backbone(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"trained on other weights than those of '.*other'"):
        load_classifier(tmp_path / "adapter", base=tmp_path / "other")


ADAPTER_KEY = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("renamed", [None, "score.weight"])
@pytest.mark.parametrize(
    ("file", "key"), [("heads.safetensors", "head.bias"), ("adapter/adapter_model.safetensors", ADAPTER_KEY)]
)
def test_adapter_form_without_a_tensor_names_it(
    file: str, key: str, renamed: str | None, adapted: torch.nn.Module, backbone: str, tmp_path: Path
) -> None:
    save_adapter(adapted, backbone, tmp_path)
    rewrite(tmp_path / file, key, renamed)
    with pytest.raises(
        ValueError, match=rf"lacks the weights \['{key}'\] and has \[{repr(renamed) if renamed else ''}\]"
    ):
        load_classifier(tmp_path)


def test_an_adapter_of_the_heads_cannot_be_taken_apart(
    classifier: PreferenceClassifier, backbone: str, tmp_path: Path
) -> None:
    adapted = get_peft_model(classifier, LoraConfig(r=2, target_modules=["q_proj", "head"]))
    with pytest.raises(ValueError, match=r"more than the backbone \(\[.*head.*export the merged form"):
        save_adapter(adapted, backbone, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_wrong_sources_are_refused(classifier: PreferenceClassifier, backbone: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no classifier 'nowhere/to/be/found'"):
        load_classifier("nowhere/to/be/found")
    save_merged(classifier, tmp_path)
    with pytest.raises(ValueError, match="is no adapter"):
        load_classifier(tmp_path, base=backbone)
