"""The card that comes with a classifier; its code is run as it stands there, where moslim cannot be imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from moslim.ops.loading import unwrapped
from moslim.ops.lora import LoraOptions, add_lora
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_card import ModelCard
from moslim.reward.classifier_export import save_adapter, save_merged
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.scorer import Scorer

TEMPLATE = "{% for m in messages %}so {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}very {% endif %}"
PAIRS = [("how cake", "good very very ."), ("why boat", ""), ("how boat", "bad .")]
RUN = """
import json, os, re, sys
sys.modules["moslim"] = None  # importing it is an error
found = []
for folder in sys.argv[2:]:
    os.chdir(folder)
    text = open("README.md", encoding="utf-8").read()
    code = re.search(r"## Use without moslim.*?```python\\n(.*?)```", text, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    found.append([names["score"](*pair) for pair in json.loads(sys.argv[1])])
print(json.dumps(found))
"""


def trained(model: PreferenceClassifier) -> PreferenceClassifier:
    """Gives a classifier weights that make probabilities differ, as training would; a regression must not saturate."""
    spread = 0.05 if model.config.link == "regression" else 0.3
    for name, parameter in model.named_parameters():
        if "head" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def export(
    folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, base: str, record: dict | None = None
) -> None:
    form = "adapter" if hasattr(model, "peft_config") else "merged"
    if form == "adapter":
        save_adapter(model, base, folder)
    else:
        save_merged(model, folder)
    tokenizer.save_pretrained(folder)
    card = ModelCard(unwrapped(model).config, tokenizer, form, base, record or {})
    (folder / "README.md").write_text(card.text(), encoding="utf-8")


@pytest.mark.slow
def test_code_of_the_card_gives_our_probabilities_without_moslim(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = AutoTokenizer.from_pretrained(backbone)
    chatty = AutoTokenizer.from_pretrained(backbone)
    chatty.chat_template = TEMPLATE
    framed = AutoTokenizer.from_pretrained(backbone)
    framed.cls_token, framed.sep_token, framed.eos_token = "<pad>", "</s>", None
    special = [("<pad>", 0), ("</s>", framed.sep_token_id)]
    framed.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=special)
    bert = AutoModel.from_config(BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    build = PreferenceClassifier.from_backbone
    corn = build(backbone, preferences, link="corn", head_hidden=5, pooling="mean")
    corn.config.temperatures = [0.5, 2.0]
    lora = build(backbone, preferences, link="regression")
    models = {
        "softmax": (build(backbone, preferences), plain),
        "corn": (corn, chatty),
        "bert": (build(bert, preferences, link="regression", head_hidden=3, pooling=["first", "max"], layer=1), framed),
        "adapter": (add_lora(lora, LoraOptions(rank=2, target_modules=["v_proj"]), trained_whole=["head"]), chatty),
    }
    expected = []
    for name, (model, tokenizer) in models.items():
        export(tmp_path / name, trained(model), tokenizer, backbone)
        probs = Scorer(tmp_path / name).probabilities(*zip(*PAIRS, strict=True))
        assert probs.std(0).amax(-1).min() > 1e-4, name  # else any code would do
        expected.append(probs)
    card = (tmp_path / "bert" / "README.md").read_text()
    assert 'ids = [0] + tokenizer(prompt, add_special_tokens=False)["input_ids"] + [2]\n' in card
    folders = [str(tmp_path / name) for name in models]
    command = [sys.executable, "-c", RUN, json.dumps(PAIRS), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, scores, probs in zip(models, json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        for pair, row in zip(scores, probs, strict=True):
            assert [list(levels) for levels in pair.values()] == [["bad", "good"], ["none", "some", "much"]]
            for levels, mine in zip(pair.values(), row, strict=True):
                torch.testing.assert_close(torch.tensor([*levels.values()]), mine[: len(levels)], msg=name)


@pytest.fixture
def card(preferences: PreferenceSet, backbone: str) -> ModelCard:
    classifier = PreferenceClassifier.from_backbone(backbone, preferences, max_length=64)
    tables = {"path": "nvidia/HelpSteer2", "train": "train"}, {"path": "mine.csv"}
    sources = [{"class": "Table", "options": options} for options in tables]
    validation = {"amount/accuracy": 0.8125, "tone/kappa": 0.5, "mean/mae": 0.25, "so/tone/accuracy": 0.1}
    labels = {"tone": [3, 4], "amount": [1, 0, 2]}
    record = {"steps": 12, "rows": 10, "sources": sources, "labels": labels, "validation": validation}
    return ModelCard(classifier.config, AutoTokenizer.from_pretrained(backbone), "merged", "Qwen/Qwen3-0.6B", record)


def metadata(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_metadata_is_what_the_hub_reads(card: ModelCard) -> None:
    found = metadata(card.text())
    assert found["base_model"] == "Qwen/Qwen3-0.6B" and found["base_model_relation"] == "finetune"
    assert found["datasets"] == ["nvidia/HelpSteer2"]
    assert "reward-model" in found["tags"]
    card.form, card.base = "adapter", "outputs/quickstart/starter/model"
    assert "base_model" not in metadata(card.text())  # the Hub refuses what is no repository


def test_card_says_what_was_learned_from_and_how_well(card: ModelCard) -> None:
    text = card.text()
    assert "| tone | bad / good | 3 / 4 |" in text and "| amount | none / some / much | 1 / 0 / 2 |" in text
    assert "10 question-answer pairs, 12 optimizer steps" in text and "path = `mine.csv`" in text
    assert "| tone | - | - | - | 0.500 |" in text
    assert "| amount | 0.812 | - | - | - |" in text and "| mean | - | - | 0.250 | - |" in text
    assert "Not calibrated" in text and "It reads 64 tokens" in text


def test_card_of_a_calibrated_classifier(card: ModelCard) -> None:
    card.config.temperatures = [1.5, 0.75]
    measures = {f"calibration/tone/ece/{when}": value for when, value in (("before", 0.2), ("after", 0.05))}
    card.record = {**card.record, "validation": measures}
    assert "| tone | 1.50 | 0.200 to 0.050 | - | - |" in card.text()
    assert "Not measured" in card.text()


def test_card_tells_of_the_runs_before(card: ModelCard) -> None:
    measured = {"amount/mae": 0.125, "tone/kappa": 0.25, "mean/mae": 0.125}  # tone was evaluated, not trained
    last = {"sources": [], "rows": 5, "steps": 3, "labels": {"amount": [2, 2, 1], "tone": [1, 1]}}
    first = {"steps": 7, "validation": {"amount/accuracy": 0.5}}
    card.record = {**last, "validation": measured, "added": ["amount"], "before": {**card.record, "before": first}}
    text = card.text()
    told = [
        "5 question-answer pairs, 3 ",
        "Before that, 10 question-answer pairs, 12 ",
        "Before that, 7 optimizer steps on",
    ]
    places = [text.index(one) for one in told]
    assert places == sorted(places) and metadata(text)["datasets"] == ["nvidia/HelpSteer2"]
    assert "| tone | bad / good | 3 / 4 |" in text and "| amount | none / some / much | 2 / 2 / 1 |" in text
    assert "| tone | - | - | - | 0.500 |" in text and "| amount | - | - | 0.125 | - |" in text
    assert "| mean | - | - | - | - |" in text
    del card.record["added"]  # all heads were trained: what was measured before is of other weights
    assert "| tone | - | - | - | 0.250 |" in card.text() and "| amount | - | - | 0.125 | - |" in card.text()


def test_card_without_a_record_says_so(card: ModelCard) -> None:
    card.record = {}
    text = card.text()
    assert "Not recorded." in text and "Not measured" in text
    assert "| tone | bad / good | - |" in text


def test_links_and_code_of_the_card_name_what_is_there(card: ModelCard) -> None:
    for code in re.findall(r"```python\n(.*?)```", card.text(), re.DOTALL):
        compile(code, "README.md", "exec")
    assert "python main.py predict --model.classifier FOLDER --data.source.predict rows.jsonl" in card.text()
