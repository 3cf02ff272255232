"""Runs what ``docs/serving.md`` shows, from the first command to the last."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moslim.cli import run
from moslim.reward.scorer import Scorer
from tests.helpers.word_task import save_backbone

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
LEVELS = {"tone": ["bad", "good"], "amount": ["none", "some", "much"]}
CONFIG = {
    "preferences": {"dimensions": LEVELS},
    "trainer": {
        "default_root_dir": "outputs",
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
    "model": {
        "class_path": "moslim.RewardClassifier",
        "init_args": {
            "backbone": "start",
            "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
        },
    },
    "data": {
        "class_path": "moslim.PreferenceDataModule",
        "init_args": {
            "batch_size": 4,
            "source": {
                "class_path": "moslim.data.Table",
                "init_args": {"path": "train.jsonl", "validation": "train.jsonl", "test": "train.jsonl"},
            },
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands of the page have run."""
    folder = tmp_path_factory.mktemp("serving")
    save_backbone(folder / "start", seed=0)
    answers = [("good", 0), ("bad .", 1), ("good very very .", 2)]
    train = [
        {"question": f"how {thing}", "answer": text, "tone": int("good" in text), "amount": amount, "id": i}
        for i, thing in enumerate(["cake", "boat"] * 4)
        for text, amount in answers
    ]
    rows = [{"id": f"r{i}", "question": "why cake", "answer": f"{'very ' * i}good"} for i in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(sys, "argv", ["main.py"])
        for name, records in (("train.jsonl", train), ("rows.jsonl", rows)):
            Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
        Path("mine.yaml").write_text(yaml.safe_dump(CONFIG))
        for block in re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL):
            for line in block.splitlines():
                run(shlex.split(line.removeprefix("python main.py ")))
    return folder


def scores(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_checkpoint_folder_and_adapter_give_the_same_scores(folder: Path) -> None:
    first, *others = (scores(folder / name) for name in ("scores.jsonl", "again.jsonl", "third.jsonl"))
    assert [record["id"] for record in first] == ["r0", "r1", "r2", "r3", "r4"]
    assert {"question", "answer", "probabilities", "levels", "expected"} <= first[0].keys()
    for records in others:
        for mine, theirs in zip(records, first, strict=True):
            assert mine["levels"] == theirs["levels"]
            assert mine["expected"]["amount"] == pytest.approx(theirs["expected"]["amount"], abs=1e-4)


def test_python_code_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert isinstance(names["scorer"], Scorer) and names["tensor"].shape == (1, 2, 3)
    again = names["scorer"].probabilities(["How do I make tea?"], ["Boil some water."])  # now the adapter form
    torch.testing.assert_close(again, names["tensor"])
    assert names["many"][0] == names["scores"] and set(names["scores"].levels) == {"tone", "amount"}


def test_card_has_the_test_of_these_weights_only(folder: Path) -> None:
    results = [json.loads(file.read_text()) for file in folder.glob("outputs/version_*/reward.json")]
    (result,) = (result for result in results if result["n_rows"] == 24)
    text = (folder / "shared" / "merged" / "README.md").read_text()
    assert "On 24 test rows:" in text and f"| mean | {result['mean']['accuracy']:.3f} |" in text
    assert "test rows" not in next(folder.glob("outputs/version_*/classifier/README.md")).read_text()


def test_files_are_those_that_the_page_lists(folder: Path) -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE))
    found = {f"{path.name}/" if path.is_dir() else path.name for path in (folder / "shared" / "merged").iterdir()}
    assert found - listed == {"tokenizer.json", "tokenizer_config.json"} and listed <= found


def test_card_tells_of_the_run_after_export_as_after_fit(folder: Path) -> None:
    (fitted,) = folder.glob("outputs/version_*/classifier/README.md")
    exported = (folder / "shared" / "merged" / "README.md").read_text()
    assert exported.split("On validation rows:")[1] == fitted.read_text().split("On validation rows:")[1]
    assert "24 question-answer pairs, 6 optimizer steps" in exported and "path = `train.jsonl`" in exported
    assert "| tone | bad / good | 8 / 16 |" in exported
    assert re.search(r"\| mean \| 0\.\d{3} \|", exported)
