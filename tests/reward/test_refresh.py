"""Runs what ``docs/refresh.md`` shows, from the first command to the last, with the gold scorer for a rater."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moslim.cli import run
from moslim.data.sources.table import Table
from moslim.data.types import RowKind, Split
from moslim.preferences import PreferenceSet
from moslim.reward.scorer import Scorer
from moslim.workbench.grammar import LEVELS, TOPICS, ask, gold_levels
from tests.helpers.tiny_world import save_world

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "refresh.md").read_text(encoding="utf-8")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 6}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
DATA = "moslim.PreferenceDataModule"
MINE = {
    "preferences": {"dimensions": LEVELS},
    "trainer": {**QUIET, "default_root_dir": "outputs/mine"},
    "model": {
        "class_path": "moslim.RewardClassifier",
        "init_args": {
            "backbone": "outputs/quickstart/starter/model",
            "output": "outputs/mine/classifier",
            "optimizer": ADAMW,
        },
    },
    "data": {
        "class_path": DATA,
        "init_args": {
            "batch_size": 8,
            "source": {"class_path": "moslim.data.Table", "init_args": {"path": "train.jsonl"}},
        },
    },
}
POLICY = {
    "preferences": {"dimensions": LEVELS},
    "trainer": {**QUIET, "max_steps": 1, "default_root_dir": "outputs/policy"},
    "model": {
        "class_path": "moslim.PolicyTrainer",
        "init_args": {
            "model": "outputs/quickstart/starter/model",
            "classifier": "outputs/mine/classifier",
            "mapping": "moslim.mapping.ExpectedDistance",
            "policy_optimizer": "moslim.algorithms.RLOO",
            "engine": {"class_path": "moslim.generation.TorchEngine", "init_args": {"max_new_tokens": 6}},
            "num_generations": 2,
        },
    },
    "data": {
        "class_path": DATA,
        "init_args": {"source": {"class_path": "moslim.data.Workbench"}, "batch_size": 4},
    },
}
REQUESTS = [
    {"question": ask(topic, form), "warmth": (i + form) % 5, **({"formality": 0} if form else {})}
    for i, topic in enumerate(TOPICS[:20])
    for form in (0, 1)
]


def lines(name: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def save(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def label() -> None:
    """Labels the scored answers; on every fourth one two raters disagree about warmth."""
    rows = []
    for i, row in enumerate(lines("scores.jsonl")):
        levels: dict[str, Any] = dict(gold_levels(row["question"], row["answer"]))
        if i % 4 == 0:
            levels["warmth"] = [0, 4]
        rows.append({key: row[key] for key in ("question", "requested", "answer")} | levels)
    save("labelled.jsonl", rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands of the page have run."""
    folder = tmp_path_factory.mktemp("refresh")
    answers = ["Hey pal, check this. Cheers.", "Check the pipe. Good luck."]
    train = [
        {"question": ask(topic, 0), "answer": text, **gold_levels(ask(topic, 0), text)}
        for topic in TOPICS[:12]
        for text in answers
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", sys.path.copy())
        patch.setattr(sys, "argv", ["main.py"])
        save_world(folder)
        save("train.jsonl", train)
        save("requests.jsonl", REQUESTS)
        Path("mine.yaml").write_text(yaml.safe_dump(MINE))
        Path("policy.yaml").write_text(yaml.safe_dump(POLICY))
        Path("refresh.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
        run(["fit", "--config", "mine.yaml"])
        run(["fit", "--config", "policy.yaml"])
        blocks = re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)
        for number, block in enumerate(blocks):
            for line in block.splitlines():
                run(shlex.split(line.removeprefix("python main.py ")))
            if number == 0:
                label()
    return folder


def test_answers_keep_what_was_requested_to_the_scores(folder: Path) -> None:
    scores = lines(folder / "scores.jsonl")
    asked = [{name: row[name] for name in ("warmth", "formality") if name in row} for row in REQUESTS]
    assert [row["requested"] for row in scores] == asked
    assert [row["question"] for row in scores] == [row["question"] for row in REQUESTS]
    assert all(set(row["probabilities"]) == set(LEVELS) for row in scores)


def test_the_gap_before_and_after_is_that_of_the_two_classifiers(folder: Path) -> None:
    before, after = sorted(folder.glob("outputs/refresh/**/reward.json"), key=lambda file: file.stat().st_mtime)
    tested = held_out(folder)
    asked = [row["requested"]["warmth"] for row in tested]
    results = [json.loads(file.read_text()) for file in (before, after)]
    assert 0 < len(tested) < len(REQUESTS)
    assert {result["requests"]["dimensions"]["warmth"]["n_rows"] for result in results} == {len(tested)}
    assert results[0]["requests"]["mean"]["gold"] == results[1]["requests"]["mean"]["gold"]
    assert results[0]["requests"]["mean"]["proxy"] != results[1]["requests"]["mean"]["proxy"]
    for result, place in zip(results, ("mine", "refresh"), strict=True):
        found = result["requests"]["dimensions"]["warmth"]
        assert found["gap"] == pytest.approx(found["proxy"] - found["gold"], abs=2e-6)
        scorer = Scorer(folder / "outputs" / place / "classifier")
        probs = scorer.probabilities([row["question"] for row in tested], [row["answer"] for row in tested])
        warm = probs[torch.arange(len(tested)), scorer.preferences.names.index("warmth"), asked]
        assert found["proxy"] == pytest.approx(warm.mean().item(), abs=1e-5)
        labels = [row["warmth"] if isinstance(row["warmth"], list) else [row["warmth"]] for row in tested]
        met = [votes.count(level) / len(votes) for votes, level in zip(labels, asked, strict=True)]
        assert found["gold"] == pytest.approx(sum(met) / len(met), abs=1e-5)
    page = after.with_name("report.md").read_text()
    assert "## Answers to requests" in page


def held_out(folder: Path) -> list[dict[str, Any]]:
    """The labelled rows that the page's split leaves for the test."""
    table = Table(str(folder / "labelled.jsonl"), requested="requested", validation_share=0.1, test_share=0.4)
    kept = {row.question for row in table.rows(RowKind.LABELLED, Split.TEST, PreferenceSet(LEVELS), 0)}
    return [row for row in lines(folder / "labelled.jsonl") if row["question"] in kept]


def test_the_policy_goes_on_with_the_new_classifier(folder: Path) -> None:
    assert list(folder.glob("outputs/policy/second/**/last.ckpt"))
    first = AutoModelForCausalLM.from_pretrained(folder / "outputs/policy/first")
    start = AutoModelForCausalLM.from_pretrained(folder / "outputs/quickstart/starter/model")
    assert not torch.equal(first.model.embed_tokens.weight, start.model.embed_tokens.weight)
