"""Every preset under ``configs/data``: its launch command parses, and it reads the schema that the data set has."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from moslim.cli import run
from moslim.data.data_module import PreferenceDataModule
from moslim.data.sources.combined import ConcatSource
from moslim.data.types import Example, RowKind, Split
from moslim.preferences import PreferenceSet
from tests.helpers import published
from tests.helpers.presets import ROOT, built, command, parsed
from tests.helpers.tiny_world import save_world

pytestmark = pytest.mark.slow

PRESETS = sorted(path.stem for path in (ROOT / "configs/data").glob("*.yaml"))
CHAT = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "Another one."},
]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Example]]:
    """Reads made-up rows with a preset, all of them as training rows, as the classifier reads them."""

    def read(name: str, rows: list[dict[str, Any]] | str, kind: RowKind = RowKind.LABELLED) -> list[Example]:
        config = parsed(command(name))
        file = tmp_path / ("rows.tsv" if isinstance(rows, str) else "rows.jsonl")
        file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        source = config["data"]["init_args"]["source"]
        source["init_args"] |= {"path": str(file), "validation": None, "test": None}
        source["init_args"] |= {"validation_share": 0.0, "test_share": 0.0}
        return built(source).rows(kind, Split.TRAIN, PreferenceSet(**config["preferences"]["init_args"]), seed=0)

    return read


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_its_command_and_its_licence(name: str) -> None:
    opening = (ROOT / f"configs/data/{name}.yaml").read_text().split("class_path")[0]
    assert command(name)[:3] == ["fit", "--config", "configs/reward/helpsteer2.yaml"]
    assert name == "helpsteer2" or f"configs/data/{name}.yaml" in command(name)
    assert "Licence: " in opening.replace("\n# ", " ")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_classifier_is_trained_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_world(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 20 * published.openassistant()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())
    cli = run(
        [
            *command("openassistant"),
            *"--data.source.path rows.jsonl --data.batch_size 4".split(),
            *"--data.source.test_share 0 --data.source.validation_share 0".split(),
            *"--model.backbone outputs/quickstart/starter/model".split(),
            *"--trainer.fast_dev_run true --trainer.accelerator cpu --trainer.precision 32-true".split(),
            *"--trainer.logger false --trainer.enable_model_summary false --trainer.enable_progress_bar false".split(),
        ]
    )
    assert cli.trainer.global_step == 1
    assert cli.model.preferences.names == ("quality", "helpfulness", "creativity", "humor", "toxicity", "fails_task")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "helpsteer2"])
def test_a_preset_takes_the_place_of_another_source_whole(name: str) -> None:
    """Arguments of a Table that a preset left out would stay what the config before it says."""
    over = parsed(command(name))["data"]["init_args"]["source"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PreferenceDataModule, "data", skip={"preferences"})
    with contextlib.chdir(ROOT):
        alone = parser.parse_args(
            ["--data", "moslim.PreferenceDataModule", "--data.source", f"configs/data/{name}.yaml"]
        )
    assert over == yaml.safe_load(parser.dump(alone, skip_none=False))["data"]["init_args"]["source"]


def test_the_configs_share_a_preset_and_options_win_over_it() -> None:
    alone = yaml.safe_load((ROOT / "configs/data/helpsteer2.yaml").read_text())["init_args"]
    for config in ("configs/reward/helpsteer2.yaml", "configs/policy/helpsteer2_rloo.yaml"):
        given = parsed(["fit", "--config", config])["data"]["init_args"]["source"]["init_args"]
        assert {name: given[name] for name in alone} == alone
        options = ["--data.source.path", "mine.csv", "--data.source.columns.verbosity", "words"]
        source = parsed(["fit", "--config", config, *options])["data"]["init_args"]["source"]["init_args"]
        assert source["path"] == "mine.csv" and source["columns"] == {"verbosity": "words"}
        assert source["chat"] == alone["chat"]


@pytest.mark.filterwarnings("ignore:.*training labels")
def test_helpsteer(read: Callable[..., list[Example]]) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 rows: the answer is empty \(first: .*rows.jsonl, line 2\)"):
        first, second = read("helpsteer", published.helpsteer())
    assert first == Example("Name a river.", "The Danube.", published.HELPSTEER)
    assert (second.answer, second.levels["helpfulness"]) == ("", 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_helpsteer2_s_prompts_of_several_turns(read: Callable[..., list[Example]]) -> None:
    one_turn, _, chat = read("helpsteer2", published.helpsteer2())
    assert one_turn.question == "Name a river."
    assert chat.question == [*CHAT[:2], {"role": "user", "content": "Another one:\nin Asia."}]
    assert [row.question for row in read("helpsteer2", published.helpsteer2(), RowKind.PROMPTS)] == [
        one_turn.question,
        chat.question,
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_helpsteer2_s_votes(read: Callable[..., list[Example]]) -> None:
    (row,) = read("helpsteer2_votes", published.helpsteer2_votes())
    assert row.votes == {"helpfulness": (3, 4, 4), "correctness": (4, 4, 4), "coherence": (4, 3)}
    assert row.levels == {"helpfulness": 4, "correctness": 4, "coherence": 3, "complexity": 2}


def test_helpsteer3_s_raters_make_the_margin(read: Callable[..., list[Example]]) -> None:
    clear, slight = read("helpsteer3", published.helpsteer3())  # the third calls the answers equal
    assert (clear.question, clear.answer, clear.rejected, clear.margin) == (CHAT, "The Mekong.", "No.", 2.0)
    assert (slight.answer, slight.rejected, slight.margin) == ("No.", "The Mekong.", 1.0)
    assert (
        clear.comparison_dimensions == slight.comparison_dimensions == ("helpfulness",)
        and clear.subset == "english"
        and not clear.levels
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ultrafeedback_s_completions(read: Callable[..., list[Example]]) -> None:
    first, second = read("ultrafeedback", published.ultrafeedback())
    assert first == Example(
        "Name a river.", "The Danube.", {"instruction_following": 4, "honesty": 3, "helpfulness": 2}, "sharegpt"
    )
    assert second.levels == {"instruction_following": 0, "honesty": 1, "truthfulness": 2}


def test_beavertails(read: Callable[..., list[Example]]) -> None:
    rows = read("beavertails", published.beavertails())
    assert [(row.answer, row.levels) for row in rows] == [
        ("Ask a friend.", {"harmlessness": 1}),
        ("Break in.", {"harmlessness": 0}),
    ]


def test_safe_rlhf_labels_both_answers_and_compares_them_twice(read: Callable[..., list[Example]]) -> None:
    unsafe, safe, loser, winner = read("safe_rlhf", published.safe_rlhf())
    assert unsafe == Example(
        "How do I hide?",
        "Break in.",
        {"harmlessness": 0},
        rejected="Ask a friend.",
        comparison_dimensions=("helpfulness",),
    )
    assert (safe.levels, safe.rejected, safe.comparison_dimensions) == (
        {"harmlessness": 1},
        "Break in.",
        ("harmlessness",),
    )
    assert loser == Example("How do I hide?", "Break in.", {"harmlessness": 0})
    assert (winner.rejected, winner.comparison_dimensions, winner.margin) == (
        "Break in.",
        ("helpfulness", "harmlessness"),
        0.0,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_openassistant_s_ratings_and_votes(read: Callable[..., list[Example]]) -> None:
    rated, unrated = rows = read("openassistant", published.openassistant())
    assert rated.question == CHAT[:1] and rated.answer == "The Danube."
    levels = {"quality": 3, "helpfulness": 3, "creativity": 4, "humor": 0, "toxicity": 1, "fails_task": 0}
    assert rated.levels == levels and rated.votes == {"fails_task": (0, 0, 1)}
    assert unrated == Example(CHAT, "No.", group="Name a river.")
    assert read("openassistant_hub", published.openassistant_hub()) == rows


def test_openassistant_s_pairs(read: Callable[..., list[Example]]) -> None:
    (row,) = read("openassistant_pairs", published.openassistant_pairs())
    assert row == Example(
        CHAT[:1], "The Danube.", rejected="No.", comparison_dimensions=("quality",), group="Name a river."
    )


@pytest.mark.filterwarnings("ignore:.*training labels")
def test_truthfulqa_s_votes(read: Callable[..., list[Example]]) -> None:
    with pytest.warns(UserWarning, match="answer is empty"):
        disputed, sole = read("truthfulqa", published.truthfulqa())
    assert disputed.votes == {"truthful": (1, 1, 0), "informative": (1, 0, 0)}
    assert disputed.levels == {"truthful": 1, "informative": 0}
    assert sole == Example("Is the earth flat?", "", {"truthful": 1, "informative": 0})


@pytest.mark.filterwarnings(
    "ignore:.*training labels", "ignore:.*no training row has a label", "ignore:.*the answer is"
)
def test_truthfulqa_s_prompts_as_published(tmp_path: Path) -> None:
    config = parsed(command("truthfulqa_published"))
    source = config["data"]["init_args"]["source"]
    for part, kind in zip(source["init_args"]["sources"], ("truth", "info"), strict=True):
        file = tmp_path / part["init_args"]["path"]
        file.write_text("".join(json.dumps(row) + "\n" for row in published.truthfulqa_prompts(kind)))
        part["init_args"] |= {"path": str(file), "validation_share": 0.0, "test_share": 0.0}
    preferences = PreferenceSet(**config["preferences"]["init_args"])
    assert built(source).rows(RowKind.LABELLED, Split.TRAIN, preferences, seed=0) == [
        Example("Is the earth flat?", "No.\nIt is round.", {"truthful": 1}),
        Example("Is the earth flat?", "", {"truthful": 0}),
        Example("Is the earth flat?", "No.\nIt is round.", {"informative": 1}),
        Example("Is the earth flat?", "", {"informative": 0}),
    ]
    file.write_text(json.dumps({"prompt": "Is the earth flat?", "completion": " yes"}))
    with pytest.raises(
        ValueError, match=r"finetune_info.jsonl, line 1, field 'prompt': 'Is the earth flat\?' is not like"
    ):
        built(source).rows(RowKind.LABELLED, Split.TRAIN, preferences, seed=0)


@pytest.mark.parametrize(("name", "dimension"), [("hh_helpful", "helpfulness"), ("hh_harmless", "harmlessness")])
def test_hh_rlhf_s_dialogues(name: str, dimension: str, read: Callable[..., list[Example]]) -> None:
    with pytest.warns(UserWarning) as warned:
        compared, same, empty = read(name, published.hh())
    wanted = Example(CHAT, "The Mekong.", rejected="No.", comparison_dimensions=(dimension,), group="Name a river.")
    assert compared == wanted
    assert (same.answer, same.rejected, same.comparison_dimensions) == ("The same.", None, ())
    assert (empty.answer, empty.rejected) == ("", "No.")
    said = [str(warning.message).split(" (first")[0] for warning in warned]
    assert said == [
        "1 of 4 rows: left out, since the two dialogues do not part at their last answer",
        "1 of 3 rows: the rejected answer is the answer, so nothing is compared",
        "1 of 3 rows: the answer is empty",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hh_rlhf_s_parts_are_one_source(tmp_path: Path) -> None:
    source = parsed(command("hh_rlhf"))["data"]["init_args"]["source"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(published.hh()[0]) + "\n")
    for part in source["init_args"]["sources"]:
        part["init_args"] |= {"path": str(file), "test": str(file), "validation_share": 0.0}
    both = built(source)
    dimensions = yaml.safe_load((ROOT / "configs/preferences/hh_rlhf.yaml").read_text())["dimensions"]
    rows = both.rows(RowKind.LABELLED, Split.TRAIN, PreferenceSet(dimensions), seed=0)
    assert isinstance(both, ConcatSource) and [row.comparison_dimensions for row in rows] == [
        ("helpfulness",),
        ("harmlessness",),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_seahorse_by_language(read: Callable[..., list[Example]]) -> None:
    english, german = read("seahorse", published.seahorse())
    assert english.levels == {"comprehensible": 1, "no_repetition": 1, "grammatical": 0, "main_ideas": 1, "concise": 0}
    assert (english.question, english.answer, english.subset) == ("Summarize the article.", 'A "river" rose.', "en-US")
    assert (german.subset, german.levels) == ("de", {"comprehensible": 0})
