from pathlib import Path

import pytest

from moslim.cli import run
from moslim.layers import dropped
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
