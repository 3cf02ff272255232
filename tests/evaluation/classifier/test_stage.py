"""The test stage as a whole: ``python main.py test`` on a reward classifier."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from moslim.cli import run
from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, RowKind, Split
from moslim.evaluation.best_of import BestOf
from moslim.evaluation.classifier_report import summary_table
from moslim.preferences import PreferenceSet
from moslim.reward.reward_classifier import RewardClassifier
from moslim.workbench.answers import best_of_records
from moslim.workbench.grammar import LEVELS, TOPICS
from tests.helpers.tiny_world import save_world
from tests.helpers.word_task import WordSource

pytestmark = pytest.mark.slow

CHOICES = [
    {
        "question": "how cake",
        "paraphrases": ["why cake"],
        "answers": ["good .", "bad .", "good very ."],
        "preference": {"tone": 0},
        "right": 1,
    },
    {"question": "why boat", "answers": ["bad .", "bad so .", "bad so so ."], "preference": {"amount": 2}, "right": 2},
    {"question": "why boat", "answers": ["bad .", "bad so .", "bad so so ."], "preference": {"amount": 0}, "right": 0},
]


class Compared(WordSource):
    """Twenty different rows, every third of which was preferred to a bad answer, in tone or in everything."""

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        rows = {(row.question, row.answer): row for row in super().rows(kind, split, preferences, seed)}.values()
        return [
            replace(row, rejected="bad .", comparison_dimensions=("tone",) if i % 2 else ()) if i % 3 == 0 else row
            for i, row in enumerate(rows)
        ]


@pytest.fixture
def choices(tmp_path: Path) -> str:
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    return str(path)


def measured(
    preferences: PreferenceSet, backbone: str, folder: Path, batch: int = 16, **options: Any
) -> tuple[dict[str, Any], Trainer]:
    """Runs a test with heads drawn at random, and returns ``reward.json`` and the trainer."""
    settings = {name: options.pop(name) for name in ("best_of", "report", "pair_weights") if name in options}
    module = RewardClassifier(preferences, backbone, **settings)
    torch.manual_seed(1)
    torch.nn.init.normal_(module.classifier.head.weight)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"logger": False, "use_distributed_sampler": False}
    trainer = Trainer(default_root_dir=folder, **{**plain, **quiet, **options})
    trainer.test(module, PreferenceDataModule(preferences, Compared(), eval_batch_size=batch), verbose=False)
    found = Path(trainer.log_dir or folder) / "reward.json"
    return json.loads(found.read_text()), trainer


def test_figures_are_those_of_the_predictions(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    result, trainer = measured(preferences, backbone, tmp_path)
    logged = dict(trainer.callback_metrics)
    rows = Compared().rows(RowKind.LABELLED, Split.TEST, preferences, 0)
    predicted: Any = trainer.predict(
        trainer.lightning_module, PreferenceDataModule(preferences, Compared(), eval_batch_size=7)
    )
    records = [record for batch in predicted for record in batch]
    right = [record["levels"]["amount"] == row.levels["amount"] for record, row in zip(records, rows, strict=True)]
    assert result["n_rows"] == len(rows) == 20 and result["n_questions"] == 2
    assert result["dimensions"]["amount"]["accuracy"] == pytest.approx(sum(right) / 20, abs=1e-6)
    so = [hit for hit, row in zip(right, rows, strict=True) if row.subset == "so"]
    assert result["subsets"]["so"]["dimensions"]["amount"]["accuracy"] == pytest.approx(sum(so) / len(so), abs=1e-6)
    expected = {(record["question"], record["answer"]): record["expected"] for record in records}
    margins = [
        expected[row.question, row.answer]["tone"] - expected[row.question, "bad ."]["tone"]
        for row in rows
        if row.rejected
    ]
    credits = [0.5 if abs(margin) < 1e-5 else float(margin > 0) for margin in margins]
    assert result["pairs"]["dimensions"]["tone"]["accuracy"] == pytest.approx(sum(credits) / 7, abs=1e-6)
    assert result["pairs"]["dimensions"]["amount"]["n_pairs"] == 4
    assert logged["test/amount/accuracy"] == pytest.approx(sum(right) / 20)
    assert {"test/loss", "test/so/tone/kappa", "test/tone/auroc", "test/pairs/weighted/accuracy"} <= logged.keys()


def test_nothing_depends_on_batches(preferences: PreferenceSet, backbone: str, tmp_path: Path, choices: str) -> None:
    options = {"best_of": BestOf(choices), "pair_weights": {"tone": 1.0}}
    whole, _ = measured(preferences, backbone, tmp_path / "a", 20, **options)
    parts, _ = measured(preferences, backbone, tmp_path / "b", 5, **options)
    assert close(parts, whole)


def test_two_processes_find_what_one_does(
    preferences: PreferenceSet, backbone: str, tmp_path: Path, choices: str
) -> None:
    one, _ = measured(preferences, backbone, tmp_path / "a", best_of=BestOf(choices))
    two, _ = measured(preferences, backbone, tmp_path / "b", 7, best_of=BestOf(choices), devices=2, strategy="ddp_fork")
    assert close(two, one) and two["n_rows"] == 20


def close(found: Any, expected: Any) -> bool:
    """Equal but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=2e-5) if isinstance(expected, float) else expected)


def test_an_interrupted_test_leaves_nothing_behind(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    class Stop(RuntimeError):
        pass

    class Stopping(Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            raise Stop

    module = RewardClassifier(preferences, backbone)
    source = PreferenceDataModule(preferences, Compared(), eval_batch_size=16)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "use_distributed_sampler": False}
    with pytest.raises(Stop):
        Trainer(default_root_dir=tmp_path, callbacks=[Stopping()], **quiet).test(module, source, verbose=False)
    assert not (tmp_path / "reward.json").exists()
    Trainer(default_root_dir=tmp_path, **quiet).test(module, source, verbose=False)
    assert json.loads((tmp_path / "reward.json").read_text())["n_rows"] == 20


def test_a_copy_of_the_report_and_pictures_for_dashboards(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    class Board(CSVLogger):
        taken: list[str] = []

        def log_image(self, key: str, images: list[str], step: int) -> None:
            assert Path(images[0]).exists()
            self.taken.append(key)

    copy = tmp_path / "deep" / "copy"
    _, trainer = measured(preferences, backbone, tmp_path, report=str(copy), logger=Board(tmp_path))
    names = {"reward.json", "report.md", "confusion.png", "correlation.png", "reliability.png"}
    assert names == {path.name for path in copy.iterdir()}
    assert names < {path.name for path in Path(str(trainer.log_dir)).iterdir()}
    assert Board.taken == ["test/confusion", "test/correlation", "test/reliability"]
    assert "test/mean/kappa" in (Path(str(trainer.log_dir)) / "metrics.csv").read_text()


def test_temperatures_in_use_are_measured_beside_none(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = RewardClassifier(preferences, backbone)
    module.classifier.config.temperatures = [1.0, 4.0]
    source = PreferenceDataModule(preferences, WordSource(), eval_batch_size=16)
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.test(module, source, verbose=False)
    found = json.loads((tmp_path / "reward.json").read_text())["calibration"]
    assert found["tone"]["uncalibrated"] is None
    assert found["amount"]["uncalibrated"]["brier"] != found["amount"]["brier"]


def test_a_bad_file_is_refused_before_anything_is_scored(
    preferences: PreferenceSet, backbone: str, tmp_path: Path, choices: str
) -> None:
    with Path(choices).open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"choices\.jsonl, line 4: the question is None"):
        measured(preferences, backbone, tmp_path, best_of=BestOf(choices), callbacks=[Refusing()])


class Refusing(Callback):
    def on_test_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was scored")


def test_unknown_dimension_in_pair_weights(preferences: PreferenceSet, backbone: str) -> None:
    with pytest.raises(ValueError, match="pair_weights names style"):
        RewardClassifier(preferences, backbone, pair_weights={"style": 1.0})


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    save_world(tmp_path)
    lines = best_of_records(TOPICS, 6, random.Random(0))
    Path("choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "preferences": {"dimensions": LEVELS},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "limit_test_batches": 2},
        "model": {
            "class_path": "moslim.RewardClassifier",
            "init_args": {
                "backbone": "outputs/quickstart/starter/model",
                "report": "report",
                "pair_weights": {"warmth": 0.5},
                "best_of": {"path": "choices.jsonl"},
            },
        },
        "data": {
            "class_path": "moslim.PreferenceDataModule",
            "init_args": {"source": {"class_path": "moslim.data.Workbench"}, "eval_batch_size": 8},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    mapping = ["--model.best_of.mapping", "TargetProbability", "--model.best_of.mapping.scope", "group"]
    run(["test", "--config", "config.yaml", "--ckpt_path", "none", *mapping])
    result = json.loads(Path("report/reward.json").read_text())
    said = capsys.readouterr().out
    assert said.startswith(summary_table(result)) and said.count("accuracy") == 2  # of heads and best of n
    assert result["n_rows"] == 16 and set(result["subsets"]) == {"adversarial"}
    assert result["best_of"]["n_prompts"] == 6 and result["best_of"]["paraphrases"]["n"] == 12
    assert result["best_of"]["mapping"] == "TargetProbability"
    assert "## Best of 4" in Path("report/report.md").read_text()
