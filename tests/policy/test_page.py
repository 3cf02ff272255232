"""Runs what ``docs/policy.md`` shows, from the config to the exported model and the code of its card."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moslim import load_policy
from moslim.cli import main, run
from moslim.data.prompts import PromptRenderer
from moslim.generation.torch_engine import TorchEngine
from moslim.instructions import SystemMessage, Tags, Template
from moslim.policy.policy_export import FILE, _instruction, policy_card, write_description
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import MissingFileError, UsageError
from moslim.workbench.grammar import TOPICS, ask
from tests.helpers.policy_models import enter_user_folder

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
SMALL = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "enable_model_summary": False}


@pytest.fixture(scope="module")
def folder(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where all commands of the page have run, with a tiny model for a few steps."""
    folder = tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        enter_user_folder(folder, patch, models["llama"], tokenizer)
        questions = [{"question": ask(topic, 0)} for topic in TOPICS[:48]]
        Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        (request,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
        Path("requests.jsonl").write_text(request)
        (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
        config = yaml.safe_load(text)
        config["trainer"] |= {**SMALL, "accelerator": "cpu"}
        config["model"]["init_args"] |= {"num_generations": 2, "eval_num_generations": 1}
        config["model"]["init_args"]["engine"]["init_args"]["max_new_tokens"] = 6
        config["data"]["init_args"] |= {"batch_size": 4, "validation_questions": 1, "test_questions": 1}
        Path("policy.yaml").write_text(yaml.safe_dump(config))
        for block in re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL):
            for line in block.splitlines():
                command = main if " --policy " in line else run
                command(shlex.split(line.removeprefix("python main.py ")))
    return folder


def test_a_file_of_requests_is_answered(folder: Path) -> None:
    (row,) = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert row["question"] == "How do I clean the kettle?" and row["requested"] == {"warmth": 4}


def test_the_card_s_code_runs_without_moslim(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    card = (folder / "shared/policy/README.md").read_text()
    assert "For\nformality = ceremonial, warmth = glowing" in card and "[[Preferences]] formality: ceremonial" in card
    assert "| warmth | icy / reserved / mild / friendly / glowing |" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "moslim" not in code
    monkeypatch.chdir(folder / "shared/policy")
    names: dict[str, object] = {}
    exec(code, names)
    assert capsys.readouterr().out.strip() or names["answer"] is not None
    assert isinstance(names["model"], AutoModelForCausalLM._model_mapping[type(names["model"].config)])


def test_the_card_s_prompt_is_that_of_training(tokenizer: PreTrainedTokenizerBase) -> None:
    preferences = PreferenceSet({"warmth": ["cold", "warm"]})
    for instruction in (Tags(), SystemMessage()):
        renderer = PromptRenderer(tokenizer, instruction, preferences)
        (code,) = re.findall(
            r"```python\n(.*?)```", policy_card(renderer, tokenizer, "base", TorchEngine(30)), re.DOTALL
        )
        lines = [line for line in code.splitlines() if line.startswith(("messages =", "prompt =", "inputs ="))]
        names = {"tokenizer": tokenizer}
        exec("\n".join(lines), names)
        ids = names["inputs"]["input_ids"][0].tolist()
        assert ids == renderer.ids("How do I make tea?", Preference({"warmth": 1}))


@pytest.mark.parametrize("other", ["start", "outputs/mine/classifier"])
def test_an_export_never_takes_the_place_of_what_the_policy_is_built_on(
    other: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(Path(other).rglob("*"))
    for out in (other, "."):
        with pytest.raises(ValueError, match=r"holds model\.(model|classifier) = .*name another folder"):
            run(["export", "--config", "policy.yaml", "--ckpt_path", "last", "--out", out])
    assert sorted(Path(other).rglob("*")) == before


def test_a_prediction_without_rows_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"no rows to answer; a Table takes them from data\.source\.predict"):
        run(["predict", "--config", "policy.yaml", "--ckpt_path", "last"])
    Path("misspelt.jsonl").write_text('{"question": "How do I clean the kettle?", "warmht": 2}\n')
    with pytest.warns(UserWarning, match="no row of predict asks for a level: columns named formality, warmth"):
        options = ["--data.source.predict", "misspelt.jsonl", "--model.predictions", "bare.jsonl"]
        run(["predict", "--config", "policy.yaml", "--ckpt_path", "last", *options])


def test_an_exported_policy_is_asked_without_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOSLIM_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    question = ["--question", "How do I clean the kettle?", "--samples", "2"]
    capsys.readouterr()
    run(["generate", "--config", "policy.yaml", "--ckpt_path", "last", *question, "--levels.warmth", "4"])
    trained = capsys.readouterr().out.splitlines()[-3:]
    main(["generate", "--policy", "shared/policy", *question, "--levels.warmth", "glowing"])
    assert capsys.readouterr().out.splitlines()[-3:] == trained
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--policy", "shared/policy", *question, "--levels.warmth", "hot"])
    assert stop.value.code == 2 and "no level 'hot'; lowest first, there are: icy (0)" in capsys.readouterr().err


def test_the_page_s_python_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    capsys.readouterr()
    main(["generate", "--policy", "shared/policy", "--question", "How do I clean the kettle?", "--levels.warmth", "4"])
    policy = names["policy"]
    assert policy.generate("How do I clean the kettle?", levels={"warmth": "glowing"}) == capsys.readouterr().out[:-1]
    assert [len(group) for group in names["texts"]] == [4, 4]


def test_a_completion_does_not_depend_on_what_else_is_asked(folder: Path) -> None:
    policy = load_policy(folder / "shared/policy", device="cpu")
    first, chat = "How do I clean the kettle?", [{"role": "user", "content": "How do I make tea?"}]
    requested = [{"warmth": "glowing"}, {}]
    texts = policy.generate([chat, chat], requested, num_generations=2, batch_size=1)
    assert texts == policy.generate([chat, chat], requested, num_generations=2)
    assert texts[1] == policy.generate(chat, num_generations=2) and texts[0][0] == policy.generate(chat, {"warmth": 4})
    assert policy.generate([first, chat[0]["content"]])[1] == texts[1][0]
    assert policy.generate([]) == []


def test_sampling_is_that_of_training_unless_it_is_given(folder: Path) -> None:
    policy = load_policy(folder / "shared/policy", dtype=torch.bfloat16)
    assert policy.model.dtype == torch.bfloat16
    question = "How do I clean the kettle?"
    sampled = policy.generate(question, num_generations=4)
    assert sampled == policy.generate(question, num_generations=4, seed=0)
    assert sampled != policy.generate(question, num_generations=4, seed=1) and len(set(sampled)) > 1
    assert len(set(policy.generate(question, num_generations=4, temperature=0))) == 1
    assert len(policy.generate(question, max_new_tokens=1).split()) <= 1


@pytest.mark.parametrize(
    ("question", "levels", "said"),
    [
        ("Why?", {"heat": 1}, "no dimension 'heat'; there are: formality, warmth"),
        ("Why?", {"warmth": "hot"}, "no level 'hot'; lowest first, there are: icy \\(0\\)"),
        (["Why?", "How?"], [{"warmth": 1}], "there are 1 `levels` for 2 questions"),
        (" ", None, "the question is empty"),
        ([{"role": "assistant", "content": "Why?"}], None, "must end with a user turn"),
    ],
)
def test_what_cannot_be_answered_is_refused(question: Any, levels: Any, said: str, folder: Path) -> None:
    policy = load_policy(folder / "shared/policy")
    with pytest.raises(UsageError, match=said):
        policy.generate(question, levels)


def test_what_is_taken_out_of_a_question_is_told(folder: Path) -> None:
    policy = load_policy(folder / "shared/policy")
    with pytest.warns(UserWarning, match="is taken out of the question"):
        policy.generate(["Why?", "[[Preferences]] warmth: glowing Why?"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "samples is 0: give 1 or more"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0: give at least 1"),
        (["--config", "policy.yaml"], "generate --policy FOLDER takes no --config"),
    ],
)
def test_a_shared_policy_is_asked_for_something(options, said, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--policy", "shared/policy", "--question", "Why?", *options])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": {"kind": "my_lab.Evil"}}, "there is no instruction 'my_lab.Evil'; known are tags"),
        ({"instruction": {"class_path": "os.system"}}, "it is damaged"),
        ({"dimensions": 3}, "it is damaged"),
        ({"format": 2}, "reads format 1 only"),
        ({"sampling": {"max_new_tokens": "many"}}, "it is damaged"),
    ],
)
def test_what_stands_in_an_exported_policy_is_data(change: dict, said: str, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "shared/policy" / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(UsageError, match=said):
        load_policy(tmp_path)
    with pytest.raises(MissingFileError, match=r"there is no moslim_policy\.json, which `export` of a policy writes"):
        load_policy(tmp_path / "other")


@pytest.mark.parametrize(
    "instruction", [Tags(names=False), SystemMessage(), Template("{question} <<{preferences}>>", ["<<"])]
)
def test_shipped_instructions_are_described(instruction, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    preferences = PreferenceSet({"warmth": ["cold", "warm"]})
    write_description(PromptRenderer(tokenizer, instruction, preferences), TorchEngine(30), None, tmp_path)
    again = _instruction(json.loads((tmp_path / FILE).read_text())["instruction"])
    chat = [{"role": "user", "content": "Why?"}]
    asked = Preference({"warmth": 1})
    assert again.render(chat, asked, preferences) == instruction.render(chat, asked, preferences)
    assert again.reserved == instruction.reserved


def test_an_instruction_of_one_s_own_is_not_described(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    class Mine(Tags):
        pass

    preferences = PreferenceSet({"warmth": ["cold", "warm"]})
    write_description(PromptRenderer(tokenizer, Mine(), preferences), TorchEngine(30), None, tmp_path)
    assert list(tmp_path.iterdir()) == []
