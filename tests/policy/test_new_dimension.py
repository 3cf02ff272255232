"""Runs the section of ``docs/classifier.md`` that adds a dimension from a CSV file, from the table to the policy."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moslim.cli import run
from moslim.reward.scorer import Scorer
from moslim.workbench.grammar import TOPICS, ask
from tests.helpers.policy_models import enter_user_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/classifier.md").read_text(encoding="utf-8").split("## A dimension from a CSV file\n")[1]
SECTION = SECTION.split("\n## ")[0]
POLICY_PAGE = (ROOT / "docs/policy.md").read_text(encoding="utf-8")


def test_a_dimension_from_a_csv_file_reaches_the_policy(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enter_user_folder(tmp_path, monkeypatch, models["llama"], tokenizer)
    old = Scorer("outputs/mine/classifier").preferences.names
    with open("ratings.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "completion", "rating"])
        writer.writerows([ask(topic, 0), f"Answer {i % 5}.", i % 5 + 1] for i, topic in enumerate(TOPICS[:48]))
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", SECTION, re.DOTALL):
        Path(name).write_text(text)
    small = {"accelerator": "cpu", "enable_model_summary": False}
    mine = {
        "trainer": small,
        "model": {"class_path": "moslim.RewardClassifier", "init_args": {}},
        "data": {"class_path": "moslim.PreferenceDataModule", "init_args": {}},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    (text,) = re.findall(r"```yaml\n(.*?)```", POLICY_PAGE, re.DOTALL)
    policy = yaml.safe_load(text)
    policy["trainer"] |= small | {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 0}
    policy["model"]["init_args"] |= {"num_generations": 2}
    policy["model"]["init_args"]["engine"]["init_args"]["max_new_tokens"] = 6
    policy["data"]["init_args"] |= {"batch_size": 4}
    policy["data"]["init_args"]["source"]["init_args"]["path"] = "ratings.csv"
    Path("policy.yaml").write_text(yaml.safe_dump(policy))
    commands = "".join(re.findall(r"```shell\n(.*?)```", SECTION, re.DOTALL)).splitlines()
    assert len(commands) == 3
    for line in commands:
        line = line.replace("configs/reward/extend.yaml", str(ROOT / "configs/reward/extend.yaml"))
        run(shlex.split(line.removeprefix("python main.py ")))
    extended = Scorer("outputs/politeness/classifier").preferences
    assert extended.names == (*old, "politeness") and len(extended["politeness"].levels) == 5
