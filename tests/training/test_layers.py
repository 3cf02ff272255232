import contextlib
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moslim.cli import main, run
from moslim.training.config_files import dropped, located
from moslim.utils.errors import UsageError
from tests.helpers.cli_folder import folder  # noqa: F401  # a working folder for each test

GUARDS = "moslim.callbacks.Guards"
GATE = "moslim.callbacks.Gate"


def written(text: str, name: str) -> str:
    Path(name).write_text(text)
    return name


def test_a_part_that_a_later_layer_drops_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = written(f"trainer: {{callbacks: [{{class_path: {GUARDS}}}, {{class_path: {GATE}}}]}}", "a.yaml")
    (message,) = dropped([first], {"trainer": {"callbacks": [{"class_path": "x.Gate"}]}})
    assert message.startswith(f"a.yaml: trainer.callbacks names {GUARDS}, which") and "`callbacks+` adds" in message
    assert len(dropped([first], {"trainer": {"callbacks": None}})) == 1
    assert dropped([first], {"trainer": {"callbacks": [{"class_path": GUARDS}, {"class_path": GATE}]}}) == []


def test_any_list_of_parts_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "model: {init_args: {reward_functions+: [{class_path: lab.Short}]}}\nlevels: [a, b]\n"
    kept = {"model": {"init_args": {"reward_functions": [{"class_path": "lab.Short"}]}}, "levels": ["c"]}
    assert dropped([written(text, "a.yaml")], kept) == []
    (message,) = dropped(["a.yaml"], {"model": {"init_args": {"reward_functions": []}}})
    assert message.startswith("a.yaml: model.reward_functions names lab.Short")


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "a: {b: 1}"])
def test_a_config_without_lists_of_parts(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dropped([written(text, "a.yaml"), "nowhere.yaml"], {"a": 1}) == []


@pytest.mark.parametrize(("key", "warns"), [("callbacks", True), ("callbacks+", False)])
def test_the_command_line_says_it(key, warns, recwarn):
    parts = "[{class_path: lightning.pytorch.callbacks.DeviceStatsMonitor}]"
    first = written(f"trainer: {{callbacks: {parts}}}", "first.yaml")
    parts = "[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]"
    second = written(f"trainer: {{{key}: {parts}}}", "second.yaml")
    run(["fit", "--config", "config.yaml", "--config", first, "--config", second])
    found = [str(one.message) for one in recwarn if "first.yaml: trainer.callbacks names" in str(one.message)]
    assert len(found) == warns


# --- what a layer gives anew

FIRST = """
preferences: {dimensions: {warmth: [cold, warm]}}
trainer:
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: first}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
      init_args: {log_momentum: true}
model:
  class_path: moslim.reward.reward_classifier.RewardClassifier
  init_args:
    backbone: somewhere
    head_dropout: 0.5
    loss: {class_path: moslim.reward.losses.CrossEntropy, init_args: {weights: [2]}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, weight_decay: 0.25}}
data:
  class_path: moslim.data.data_module.PreferenceDataModule
  init_args:
    batch_size: 7
    source:
      class_path: moslim.data.sources.table.Table
      init_args:
        path: first.jsonl
        question: q
        columns: {warmth: w}
        scales: {warmth: {offset: -1}}
        chat: {class_path: moslim.data.sources.conversations.Turns, init_args: {user: U, assistant: A}}
"""
TABLE, ADAMW = "moslim.data.sources.table.Table", "torch.optim.AdamW"


def layered(*rest: str) -> dict[str, Any]:
    """The whole config of ``FIRST``, and the text of a layer or options over it."""
    args = ["--config", written(FIRST, "first.yaml")]
    for number, part in enumerate(rest):
        args += ["--config", written(part, f"layer{number}.yaml")] if part.startswith("{") else part.split(" ", 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        run(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(printed.getvalue())


def source(config: dict[str, Any]) -> dict[str, Any]:
    return config["data"]["init_args"]["source"]["init_args"]


@pytest.mark.parametrize(
    "layer",
    [
        f"{{data: {{init_args: {{source: {{class_path: {TABLE}, init_args: {{path: new}}}}}}}}}}",
        f"--data.source {{class_path: {TABLE}, init_args: {{path: new}}}}",
        "{data: {init_args: {source: part.yaml}}}",
        "--data.source part.yaml",
    ],
)
def test_a_part_whose_class_is_named_starts_from_its_defaults(layer):
    written(f"{{class_path: {TABLE}, init_args: {{path: new}}}}", "part.yaml")
    config = layered(layer)
    given = source(config)
    assert given["path"] == "new" and given["question"] == "question"
    assert given["columns"] is given["scales"] is given["chat"] is None
    assert config["data"]["init_args"]["batch_size"] == 7


def test_options_go_on_after_a_class_is_named():
    given = source(layered(f"--data.source {TABLE}", "--data.source.path new", "--data.source.answer a"))
    assert (given["path"], given["answer"], given["question"], given["chat"]) == ("new", "a", "question", None)


@pytest.mark.parametrize(
    "layer",
    [
        "{data: {init_args: {source: {init_args: {path: new}}}}}",
        "{data: {init_args: {source: {path: new}}}}",
        "{data: {init_args: {source: part.yaml}}}",
        "--data.source.path new",
    ],
)
def test_a_layer_of_arguments_alone_goes_on(layer):
    written("{init_args: {path: new}}", "part.yaml")
    given = source(layered(layer))
    assert (given["path"], given["question"], given["columns"]) == ("new", "q", {"warmth": "w"})
    assert given["chat"]["init_args"] == {"user": "U", "assistant": "A"}


def test_every_part_at_every_depth():
    config = layered(
        f"{{trainer: {{logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: other}}}}}}, "
        f"model: {{init_args: {{optimizer: {{class_path: {ADAMW}, init_args: {{lr: 0.125}}}}, "
        "loss: moslim.reward.losses.CrossEntropy}}}"
    )
    assert config["trainer"]["logger"]["init_args"]["name"] == "lightning_logs"
    model = config["model"]["init_args"]
    assert model["optimizer"]["init_args"]["lr"] == 0.125
    assert model["optimizer"]["init_args"]["weight_decay"] != 0.25
    assert model["loss"]["init_args"]["weights"] is None
    assert (model["backbone"], model["head_dropout"]) == ("somewhere", 0.5)
    whole = layered(
        "{model: {class_path: moslim.reward.reward_classifier.RewardClassifier, init_args: {backbone: other}}}"
    )
    assert whole["model"]["init_args"]["head_dropout"] != 0.5


def test_the_class_alone_can_be_changed_by_an_option():
    model = layered("--model.optimizer.class_path torch.optim.Adam")["model"]["init_args"]
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["weight_decay"]) == (0.5, 0.25)


@pytest.mark.slow
def test_lists_and_names_are_replaced_with_their_arguments():
    monitor = "class_path: lightning.pytorch.callbacks.LearningRateMonitor"
    (replaced,) = layered(f"{{trainer: {{callbacks: [{{{monitor}}}]}}}}")["trainer"]["callbacks"]
    assert replaced["init_args"]["log_momentum"] is False
    for more in (f"{{trainer: {{callbacks+: [{{{monitor}}}]}}}}", f"--trainer.callbacks+ {monitor.split()[1]}"):
        first, second = layered(more)["trainer"]["callbacks"]
        assert (first["init_args"]["log_momentum"], second["init_args"]["log_momentum"]) == (True, False)
    given = source(layered("{data: {init_args: {source: {init_args: {scales: {warmth: {missing: [x]}}}}}}}"))
    assert given["scales"]["warmth"]["offset"] != -1 and given["question"] == "q"


# --- shipped configs, and files that are not there


@pytest.mark.slow
def test_a_shipped_config_can_be_copied_and_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(located("configs:reward/helpsteer2.yaml"), "mine.yaml")
    dumps = []
    for config in ("mine.yaml", "configs:reward/helpsteer2.yaml"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            run(["fit", f"--config={config}", "--data.source=configs:data/helpsteer.yaml", "--print_config"])
        dumps.append(yaml.safe_load(printed.getvalue()))
    assert dumps[0] == dumps[1]
    assert source(dumps[0])["path"] == "nvidia/HelpSteer"
    assert next(iter(dumps[0]["preferences"]["init_args"]["dimensions"])) == "helpfulness"
    with pytest.raises(
        UsageError, match=r"no shipped config configs:data/x\.yaml; there are configs:data/beavertails\.yaml"
    ):
        run(["fit", "--config", "configs:data/x.yaml"])


@pytest.mark.parametrize(
    ("layer", "key"),
    [
        ("preferences: ../no/workbench.yaml", "preferences"),
        ("data: {init_args: {source: ../no/workbench.yaml}}", "data.source"),
        ("model: {init_args: {optimizer: ../no/workbench.yaml}}", "model.optimizer"),
        ("model: {init_args: {lora: ../no/workbench.yaml}}", "model.lora"),
        ("trainer: {callbacks: [../no/workbench.yaml]}", "trainer.callbacks"),
        ("trainer: ../no/workbench.yaml", "trainer"),
    ],
)
def test_a_file_that_is_not_there(layer, key, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    written(FIRST, "first.yaml")
    Path("below").mkdir()
    written(layer, "below/layer.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "first.yaml", "--config", "below/layer.yaml"])
    said = capsys.readouterr().err.splitlines()[0]
    place = f"in {Path('below').resolve()}, the folder of layer.yaml, which names it"
    assert stop.value.code == 2
    assert said.startswith(f"error: below/layer.yaml: {key}: there is no file ../no/workbench.yaml {place}; ")
    option = layer.partition(":")[0] if key in ("preferences", "trainer") else key
    with pytest.raises(SystemExit):
        main(["fit", "--config", "first.yaml", f"--{option}", "preferences/workbench.yaml"])
    said = capsys.readouterr().err.splitlines()[0]
    assert f"{key}: there is no file preferences/workbench.yaml in {Path.cwd()}, the current folder" in said
    assert said.endswith("the shipped one is configs:preferences/workbench.yaml")
