import contextlib
import importlib.abc
import json
import sys
from dataclasses import dataclass

import jsonargparse
import lightning as L
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from moslim.callbacks.dashboards import (
    CompletionTable,
    Dashboard,
    append_rows,
    completion_rows,
    flatten,
    render,
    wandb_cell,
)
from moslim.callbacks.guards import Guards
from moslim.callbacks.monitors import ThroughputMonitor
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError

NAN = float("nan")
PREFERENCES = PreferenceSet({"warmth": ["cold", "neutral", "warm"], "length": ["short", "long"]})


@dataclass
class Rollout:
    questions: list
    completion_texts: list[str]
    targets: torch.Tensor
    probs: torch.Tensor
    per_dimension: torch.Tensor
    rewards: torch.Tensor
    completion_advantages: torch.Tensor


def rollout(answer: str = "Fine.") -> Rollout:
    return Rollout(
        questions=["How?", "How?", [{"role": "user", "content": "Why?"}], "When?"],
        completion_texts=[answer, "b", "c", "d"],
        targets=torch.tensor([[2, 1], [2, 1], [-1, 0], [-1, -1]]),
        probs=torch.tensor([[[0.25, 0.25, 0.5], [0.75, 0.25, 0.0]]]).expand(4, 2, 3),
        per_dimension=torch.tensor([[1.0, 0.5], [0.0, 0.0], [NAN, -0.25], [NAN, NAN]]),
        rewards=torch.tensor([0.75, 0.0, -0.25, 0.0]),
        completion_advantages=torch.tensor([1.0, -1.0, 0.5, NAN]),
    )


class Policy(L.LightningModule):
    def __init__(self, answer: str = "Fine.") -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.preferences = PREFERENCES
        self.rollout: Rollout | None = None
        self.answer = answer

    def training_step(self, batch, batch_idx):
        self.rollout = rollout(self.answer)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(tmp_path, callback, policy, loggers, steps=7, **options):
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=loggers,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(policy, torch.utils.data.DataLoader(torch.ones(steps, 1)))
    return trainer


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_rows_are_spread_over_the_rollout():
    first, second = completion_rows(rollout(), PREFERENCES, step=3, count=2)
    assert first == {
        "step": 3,
        "question": "How?",
        "requested": {"warmth": "warm", "length": "long"},
        "answer": "Fine.",
        "probabilities": {"warmth": [0.25, 0.25, 0.5], "length": [0.75, 0.25]},
        "rewards": {"warmth": 1.0, "length": 0.5},
        "reward": 0.75,
        "advantage": 1.0,
    }
    assert (second["question"], second["requested"]) == ("user: Why?", {"length": "short"})


def test_more_rows_than_answers():
    rows = completion_rows(rollout(), PREFERENCES, step=3, count=9)
    assert [row["answer"] for row in rows] == ["Fine.", "b", "c", "d"]
    assert (rows[3]["requested"], rows[3]["advantage"]) == ({}, None)


def test_model_text_is_inert_on_the_console():
    nasty = "[bold]x[/bold] [/] \x1b[31mred\x07\u202e\nnew line " + "long " * 200
    text = render(completion_rows(rollout(nasty), PREFERENCES, step=1, count=1), "[b]Title", ("reward",))
    assert "[b]Title" in text
    assert "[bold]x[/bold] [/]" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "…" in text
    assert "warmth: warm (+1.00)" in text


def test_history_is_appended_as_json_lines(tmp_path):
    file = tmp_path / "new" / "completions.jsonl"
    for step in (1, 2):
        append_rows(file, completion_rows(rollout("späte\nAntwort"), PREFERENCES, step, count=2))
    assert [(row["step"], row["answer"]) for row in read(file)] == [
        (1, "späte\nAntwort"),
        (1, "c"),
        (2, "späte\nAntwort"),
        (2, "c"),
    ]


def test_one_value_per_column():
    first, _, _, last = (flatten(row, PREFERENCES.names) for row in completion_rows(rollout(), PREFERENCES, 3, 4))
    assert first == {
        "step": 3,
        "question": "How?",
        "preference": "warmth: warm, length: long",
        "answer": "Fine.",
        "reward": 0.75,
        "advantage": 1.0,
        "warmth/requested": "warm",
        "warmth/reward": 1.0,
        "warmth/probabilities": [0.25, 0.25, 0.5],
        "length/requested": "long",
        "length/reward": 0.5,
        "length/probabilities": [0.75, 0.25],
    }
    assert (last["preference"], last["warmth/requested"], last["warmth/reward"]) == ("", None, None)
    assert wandb_cell(first["warmth/probabilities"]) == "0.25 0.25 0.50" and wandb_cell("a<b") == "a&lt;b"


@pytest.mark.parametrize("stopped", [False, True])
def test_the_history_is_also_parquet(stopped, tmp_path):
    policy = Policy("späte\nAntwort\u2028\x85")  # all that str.splitlines cuts at
    if stopped:
        policy.on_train_batch_start = lambda batch, i: fail() if i == 4 else None
    with pytest.raises(RuntimeError, match="enough") if stopped else contextlib.nullcontext():
        fit(tmp_path, CompletionTable(3, 2), policy, CSVLogger(tmp_path))
    folder = tmp_path / "lightning_logs" / "version_0"
    table = pyarrow.parquet.read_table(folder / "completions.parquet")
    assert table.to_pylist() == [flatten(row, PREFERENCES.names) for row in read(folder / "completions.jsonl")]
    assert table["step"].to_pylist() == ([1, 1, 3, 3] if stopped else [1, 1, 3, 3, 6, 6])
    assert str(table.schema.field("warmth/requested").type) == "string"  # though some, or all, were not asked for
    assert not list(folder.glob("*.part"))


def fail():
    raise RuntimeError("enough")


def test_first_step_and_every_interval_are_shown(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, CompletionTable(every_n_steps=3, rows=1), Policy(), logger)
    file = tmp_path / "lightning_logs" / "version_0" / "completions.jsonl"
    assert [row["step"] for row in read(file)] == [1, 3, 6]
    out = capsys.readouterr().out
    assert [f"Completions at step {step}" in out for step in (1, 2, 3, 6)] == [True, False, True, True]


def test_accumulated_batches_of_one_step_are_shown_once(tmp_path):
    fit(tmp_path, CompletionTable(1, 1), Policy(), CSVLogger(tmp_path), steps=4, accumulate_grad_batches=2)
    steps = [row["step"] for row in read(tmp_path / "lightning_logs" / "version_0" / "completions.jsonl")]
    assert steps == [1, 2]


def test_one_of_two_processes_writes(tmp_path, capfd):
    loggers = CSVLogger(tmp_path)
    fit(tmp_path, CompletionTable(2, 1), Policy(), loggers, steps=2, strategy="ddp_fork", devices=2)
    (file,) = tmp_path.rglob("completions.jsonl")
    assert [row["step"] for row in read(file)] == [1]  # two batches, one per process
    assert capfd.readouterr().out.count("Completions at step 1") == 1


@pytest.mark.slow
def test_wandb_table_keeps_its_history_and_is_escaped(tmp_path):
    import wandb

    board = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(tmp_path, CompletionTable(3, 2), Policy("<script>x</script>"), [CSVLogger(tmp_path), board])
    wandb.finish()
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/offline-run*/files/**/*.table.json")]
    rows = sorted(row for table in tables for row in table["data"])
    assert [row[0] for row in rows] == [1, 1, 3, 3, 6, 6]
    answers = {row[tables[0]["columns"].index("answer")] for row in rows}
    assert answers == {"&lt;script&gt;x&lt;/script&gt;", "c"}


def test_wandb_is_not_loaded_by_reading_options(monkeypatch):
    """jsonargparse resolves annotations, also those that only type checkers should see."""
    asked = []

    class Watcher(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "wandb":
                asked.append(name)
                raise ImportError(f"no {name} here")

    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Watcher(), *sys.meta_path])
    parser = jsonargparse.ArgumentParser()
    for part in (CompletionTable, ThroughputMonitor, Dashboard, Guards):
        parser.add_class_arguments(part, part.__name__)
    assert parser.parse_args(["--CompletionTable.rows", "3"]).CompletionTable.rows == 3
    assert asked == []


def test_fast_dev_run_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, CompletionTable(1, 1), Policy(), CSVLogger(tmp_path), steps=2, fast_dev_run=2)
    assert not list(tmp_path.rglob("completions.jsonl"))


def test_a_module_without_answers_is_refused(tmp_path):
    with pytest.raises(UsageError, match="BoringModel generates none"):
        fit(tmp_path, CompletionTable(), BoringModel(), False)


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"rows": 0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match="at least 1"):
        CompletionTable(**options)
