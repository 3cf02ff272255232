"""``predict`` of a classifier: from rows to scores, one batch at a time, and on after an interruption."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoTokenizer

from moslim.data.data_module import PreferenceDataModule
from moslim.data.sources.table import Table
from moslim.data.types import Example, RowKind, Source, Split
from moslim.ops.lora import LoraOptions
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import save_merged
from moslim.reward.losses import Corn, Regression
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from moslim.training.trainer import MoslimTrainer

ROWS = [
    {"id": 7 * i, "question": ["how cake", "why boat"][i % 2], "answer": f"{'good ' * (i % 5)}."} for i in range(11)
]


class Stop(RuntimeError):
    pass


@pytest.fixture
def saved(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> str:
    """Folder of a saved classifier."""
    return save(preferences, backbone, tmp_path / "classifier", seed=0)


def save(preferences: PreferenceSet, backbone: str, folder: Path, seed: int, **options: object) -> str:
    torch.manual_seed(seed)
    save_merged(PreferenceClassifier.from_backbone(backbone, preferences, **options), folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def predict(
    preferences: PreferenceSet,
    classifier: str,
    source: Source,
    file: Path,
    stop_after: int | None = None,
    size: int = 4,
) -> list[dict]:
    """Scores rows; ``stop_after`` interrupts after so many batches."""

    class Interrupted(RewardClassifier):
        def on_predict_batch_end(self, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().on_predict_batch_end(outputs, batch, batch_idx, dataloader_idx)
            if batch_idx + 1 == stop_after:
                raise Stop

    module = Interrupted(preferences, classifier=classifier, predictions=str(file))
    data = PreferenceDataModule(preferences, source, eval_batch_size=size)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(default_root_dir=file.parent, **quiet).predict(module, data, return_predictions=False)
    return [json.loads(line) for line in file.read_text().splitlines()]


def interrupt(*args: object, **options: object) -> None:
    with pytest.raises(Stop):
        predict(*args, stop_after=1, **options)


def test_a_saved_classifier_scores_as_its_scorer_does(
    preferences: PreferenceSet, saved: str, table: Path, tmp_path: Path
) -> None:
    records = predict(preferences, saved, Table(predict=str(table)), tmp_path / "scores.jsonl")
    assert [{key: record[key] for key in ("id", "question", "answer")} for record in records] == ROWS
    probs = Scorer(saved).probabilities(*zip(*((r["question"], r["answer"]) for r in ROWS), strict=True))
    for record, row in zip(records, probs, strict=True):
        torch.testing.assert_close(torch.tensor(record["probabilities"]["tone"]), row[0, :2], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(record["probabilities"]["amount"]), row[1], atol=1e-5, rtol=0)
        assert record["levels"] == {"tone": row[0].argmax().item(), "amount": row[1].argmax().item()}
        expected = (row[1] * torch.arange(3)).sum().item()
        assert record["expected"]["amount"] == pytest.approx(expected, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if "scores" in path.name) == ["scores.jsonl"]


def test_rows_are_read_as_they_are_scored(preferences: PreferenceSet, saved: str, tmp_path: Path) -> None:
    """So memory does not grow with the file, and an interruption loses little."""
    part = tmp_path / "scores.jsonl.part"
    behind = []

    class Endless(Source):
        def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
            raise AssertionError("all rows were asked for at once")

        def stream(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> Iterator[Example]:
            for i in range(60):
                behind.append(i - (part.read_bytes().count(b"\n") if part.exists() else 0))
                yield Example("how cake", f"good {i}")

    assert len(predict(preferences, saved, Endless(), tmp_path / "scores.jsonl")) == 60
    assert max(behind) < 3 * 4  # a batch at work, one fetched ahead, one being read


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on_after_the_last_whole_line(
    torn: bool, preferences: PreferenceSet, saved: str, table: Path, tmp_path: Path
) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "scores.jsonl"
    predict(preferences, saved, Table(predict=str(table)), whole)
    interrupt(preferences, saved, Table(predict=str(table)), file)
    part = tmp_path / "scores.jsonl.part"
    assert not file.exists() and part.read_bytes().count(b"\n") == 4
    if torn:
        part.write_bytes(part.read_bytes()[:-20])  # three whole lines
    predict(preferences, saved, Table(predict=str(table)), file)
    assert file.read_bytes() == whole.read_bytes()
    assert not part.exists() and not part.with_name("scores.jsonl.part.json").exists()


def test_nothing_is_scored_twice(preferences: PreferenceSet, saved: str, table: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    interrupt(preferences, saved, Table(predict=str(table)), file)
    part = tmp_path / "scores.jsonl.part"
    lines = part.read_text().splitlines()
    marked = [line.replace('"answer"', '"mark": 1, "answer"') for line in lines]
    part.write_text("".join(line + "\n" for line in marked))
    records = predict(preferences, saved, Table(predict=str(table)), file, size=3)
    assert [record.get("mark") for record in records] == [1] * 4 + [None] * 7
    assert [record["id"] for record in records] == [row["id"] for row in ROWS]


def test_after_a_bad_row_is_mended_the_run_goes_on(
    preferences: PreferenceSet, saved: str, table: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scores.jsonl"
    write(table, [*ROWS[:9], {"id": 63, "question": "how cake", "answer": None}, *ROWS[10:]])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 10, field 'answer'"):
        predict(preferences, saved, Table(predict=str(table)), file)
    assert not file.exists() and (tmp_path / "scores.jsonl.part").read_bytes().count(b"\n") == 4
    write(table, ROWS)
    assert len(predict(preferences, saved, Table(predict=str(table)), file)) == 11


@pytest.mark.parametrize("change", ["weights", "configuration", "chat_template", "rows", "fewer rows", "note"])
def test_another_model_or_other_rows_begin_anew(
    change: str, preferences: PreferenceSet, backbone: str, saved: str, table: Path, tmp_path: Path
) -> None:
    file, part = tmp_path / "scores.jsonl", tmp_path / "scores.jsonl.part"
    interrupt(preferences, saved, Table(predict=str(table)), file)
    rows, message = ROWS, rf"{re.escape(str(part))} was written with another {change}: starting anew"
    if change == "weights":
        saved = save(preferences, backbone, tmp_path / "other", seed=1)
    elif change == "configuration":
        config = json.loads((tmp_path / "classifier" / "config.json").read_text())
        (tmp_path / "classifier" / "config.json").write_text(json.dumps({**config, "temperatures": [2.0, 2.0]}))
    elif change == "chat_template":
        tokenizer = AutoTokenizer.from_pretrained(saved)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        tokenizer.save_pretrained(saved)
    elif change == "note":
        part.with_name("scores.jsonl.part.json").unlink()
        message = "was written with another weights and configuration"
    else:
        rows = [ROWS[0], {**ROWS[1], "answer": "bad ."}, *ROWS[2:]] if change == "rows" else ROWS[:3]
        number = 2 if change == "rows" else 4
        message = rf"line {number} of .*scores.jsonl.part is not row {number} of the source: starting anew"
    write(table, rows)
    with pytest.warns(UserWarning, match=message):
        records = predict(preferences, saved, Table(predict=str(table)), file)
    fresh = predict(preferences, saved, Table(predict=str(table)), tmp_path / "fresh.jsonl")
    assert records == fresh and len(records) == len(rows)


def test_a_second_prediction_begins_anew(preferences: PreferenceSet, saved: str, table: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    first = predict(preferences, saved, Table(predict=str(table)), file)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starting anew.*")
        assert predict(preferences, saved, Table(predict=str(table)), file) == first


def test_a_source_without_rows_is_an_error(preferences: PreferenceSet, saved: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": "a", "answer": "b", "tone": 1, "amount": 1}])
    with pytest.raises(ValueError, match=r"no rows to score; a Table takes them from data\.source\.predict"):
        predict(preferences, saved, Table(str(train)), tmp_path / "scores.jsonl")
    with pytest.raises(ValueError, match=r"data\.source\.path is not given"):
        Table(predict=str(train)).rows(RowKind.LABELLED, Split.TRAIN, preferences, 0)


# --- what a run starts from


def test_what_a_run_starts_from_must_be_clear(preferences: PreferenceSet, backbone: str, saved: str) -> None:
    with pytest.raises(ValueError, match=r"give model\.backbone, .* model\.classifier, .* or model\.extend"):
        RewardClassifier(preferences)
    with pytest.raises(ValueError, match=r"given at once"):
        RewardClassifier(preferences, backbone, saved)
    with pytest.raises(ValueError, match=r"is a saved classifier: give it as model\.classifier"):
        RewardClassifier(preferences, saved)
    with pytest.raises(ValueError, match=r"model\.pooling is for new heads"):
        RewardClassifier(preferences, classifier=saved, pooling="mean")
    with pytest.raises(ValueError, match=r"Corn needs heads with the link 'corn', but those of .* have 'softmax'"):
        RewardClassifier(preferences, classifier=saved, loss=Corn())
    for others, text in (
        ({"tone": ["bad", "good"]}, "add amount"),
        ({"tone": ["good", "bad"], "amount": ["none", "some", "much"]}, r"\['good', 'bad'\] in `preferences`, but"),
        ({"tone": ["bad", "good"], "amount": ["none", "a bit", "much"]}, r"'a bit', .* but .*'some'"),
    ):
        with pytest.raises(ValueError, match=text):
            RewardClassifier(PreferenceSet(others), classifier=saved)


@pytest.mark.slow
def test_a_saved_classifier_knows_its_dimensions_in_any_order(
    preferences: PreferenceSet, saved: str, tmp_path: Path
) -> None:
    """Every measure and label goes by name, and what is exported is what was loaded."""
    turned = PreferenceSet(dict(reversed(preferences.to_dict().items())))
    labels = [{"tone": i % 2, "amount": i % 3} for i in range(12)]
    words = [("bad", "good"), ("", "so", "so so")]
    answers = [f"{words[0][row['tone']]} {words[1][row['amount']]} ." for row in labels]
    file = write(
        tmp_path / "test.jsonl",
        [{"question": "how cake", "answer": a, **row} for a, row in zip(answers, labels, strict=True)],
    )
    found = []
    for order in (preferences, turned):
        rows = Table(str(file), test=str(file))
        module = RewardClassifier(order, classifier=saved)
        run = MoslimTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
        (measures,) = run.test(module, PreferenceDataModule(order, rows, eval_batch_size=16), verbose=False)
        found.append({name: value for name, value in measures.items() if "mean" not in name})
        assert run.lightning_module.classifier.preferences == preferences
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, nan_ok=True), name


def test_a_saved_classifier_brings_its_heads_and_their_loss(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    folder = save(preferences, backbone, tmp_path / "saved", 0, link="regression", pooling="mean", max_length=20)
    module = RewardClassifier(preferences, classifier=folder)
    assert type(module.loss) is Regression and type(RewardClassifier(preferences, backbone).loss) is Corn
    assert module.classifier.config.pooling == ["mean"] and module.pair_limit == 20
    assert module.classifier.training and all(p.requires_grad for p in module.classifier.parameters())
    again = RewardClassifier(preferences, f"{folder}/backbone", loss=Regression())
    assert torch.equal(again.classifier.backbone.norm.weight, module.classifier.backbone.norm.weight)
    assert RewardClassifier(preferences, classifier=folder, max_length=10).pair_limit == 10


def test_a_saved_classifier_is_exported_without_a_checkpoint(
    preferences: PreferenceSet, backbone: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = MoslimTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.export(RewardClassifier(preferences, classifier=saved), out=str(tmp_path / "again"))
    before, after = (Scorer(folder).classifier.state_dict() for folder in (saved, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert "without further training" in capsys.readouterr().out
    with pytest.raises(ValueError, match="export needs a trained model"):
        trainer.export(RewardClassifier(preferences, backbone), out=str(tmp_path / "untrained"))


def test_only_a_classifier_with_an_adapter_has_an_adapter_form(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model\.lora is null"):
        RewardClassifier(preferences, backbone).export_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapted = RewardClassifier(preferences, backbone, lora=LoraOptions(rank=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="holds the start = "):
        adapted.export_adapter(backbone)
