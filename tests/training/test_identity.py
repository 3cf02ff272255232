"""What a checkpoint records beside its weights, and what is said where it differs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moslim.data.types import Example
from moslim.instructions import PreferenceInstruction, SystemMessage, Tags, Template, sample_prompts
from moslim.preferences import PreferenceSet
from moslim.training.identity import check_identity, described, keep_identity, plain, rows_digest, vocabulary_digest
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import build_tokenizer

MEANING = {"model.pooling": ["max"], "model.layer": 1, "preferences": [["tone", ("bad", "good")]]}
RUN = {"data.seed": 3}


def checkpoint() -> dict:
    found: dict = {}
    keep_identity(found, MEANING, RUN)
    return found


def test_equal_entries_and_those_of_one_side_pass() -> None:
    assert check_identity(checkpoint(), MEANING, RUN) == set()
    assert check_identity(checkpoint(), {"model.layer": 1, "new": 2}, {}) == set()


def test_one_message_lists_every_difference_and_both_remedies(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    now = {**MEANING, "model.pooling": ["last"], "model.layer": None}
    with pytest.raises(UsageError) as raised:
        check_identity(checkpoint(), now, {"data.seed": 4}, path=tmp_path / "checkpoints" / "a.ckpt")
    lines = str(raised.value).splitlines()
    assert lines[1:4] == [
        '  model.pooling: saved ["max"], now ["last"]',
        "  model.layer: saved 1, now null",
        "  data.seed: saved 3, now 4",
    ]
    assert f"--config {tmp_path / 'config.yaml'}" in lines[4]
    assert "--model.accept_changes '[model.pooling, model.layer, data.seed]'" in lines[4]


def test_what_is_accepted_may_differ_unless_it_never_may() -> None:
    now = {**MEANING, "model.layer": None}
    assert check_identity(checkpoint(), now, RUN, ["model.layer"]) == {"model.layer"}
    assert check_identity(checkpoint(), MEANING, RUN, ["model.layer"]) == set()
    with pytest.raises(UsageError, match=r"model\.layer: saved 1, now null") as raised:
        check_identity(checkpoint(), now, RUN, ["model.layer"], never=["model.layer"])
    assert "accept_changes" not in str(raised.value)
    with pytest.raises(UsageError, match=r"accept_changes names layer, .* there are: data\.seed, model\.layer, "):
        check_identity(checkpoint(), MEANING, RUN, ["layer"])


def test_what_another_version_of_transformers_writes_into_a_configuration_is_not_compared() -> None:
    saved = {"heads": 2, "text": {"width": 8, "old": 1}}
    found: dict = {}
    keep_identity(found, {"model.model": saved, "data.template_args": {}}, {})
    now = {"heads": 2, "new": None, "text": {"width": 8, "new": [1]}}
    assert check_identity(found, {"model.model": now, "data.template_args": {}}, {}) == set()
    with pytest.raises(UsageError) as raised:
        check_identity(found, {"model.model": {**now, "text": {"width": 9, "new": 2}}}, {})
    assert str(raised.value).splitlines()[1] == "  model.model: text width saved 8, now 9"
    with pytest.raises(UsageError, match=r"template_args: so saved null, now true"):
        check_identity(found, {"data.template_args": {"so": True}}, {})


def test_long_texts_are_shown_where_they_part() -> None:
    found: dict = {}
    keep_identity(found, {"chat_template": "a" * 5000 + "old" + "b" * 5000}, {})
    with pytest.raises(UsageError) as raised:
        check_identity(found, {"chat_template": "a" * 5000 + "new" + "b" * 5000}, {})
    assert "aold" in str(raised.value) and "anew" in str(raised.value) and len(str(raised.value)) < 1000


def test_a_checkpoint_without_a_record_is_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="does not record the options"):
        assert check_identity({}, MEANING, RUN) == set()


class Shouting(PreferenceInstruction):
    def __init__(self, mark: str = "!", pattern: str = "a") -> None:
        self._mark, self.pattern = mark, re.compile(pattern)

    def render(self, messages, preference, preferences):
        return [
            *messages[:-1],
            {"role": "user", "content": messages[-1]["content"] + self._mark * len(preference.levels)},
        ]


def test_an_instruction_is_known_by_its_class_its_options_and_its_prompts() -> None:
    preferences = PreferenceSet({"tone": ["bad", "good"]})
    assert described(Tags()) == {"class": "Tags", "names": True} != described(Tags(names=False))
    assert described(Shouting("?")) == {"class": f"{__name__}.Shouting", "mark": "?", "pattern": "re.compile('a')"}
    kinds = [Tags(), Tags(names=False), SystemMessage(), Shouting(), Shouting("?")]
    kinds += [Template("{preferences} {question}"), Template("{question} {preferences}")]
    samples = [sample_prompts(kind, preferences) for kind in kinds]
    assert all(one != other for i, one in enumerate(samples) for other in samples[:i])
    assert sample_prompts(Tags(), PreferenceSet({"tone": ["good", "bad"]})) != samples[0]
    (example,) = [chat[-1]["content"] for asked, chat in samples[0]["prompts"].items() if asked == "{'tone': 1}"]
    assert example == "[[tone: good]] How do I make tea?"


def test_plain_data_is_stable() -> None:
    assert plain({"b": {3, 1}, "a": (Path("x"), Shouting, None)}) == {
        "b": [1, 3],
        "a": ["PosixPath('x')", f"{__name__}.Shouting", None],
    }


ROWS = [
    Example("a", "b", {"tone": 1, "size": 0}),
    Example([{"role": "user", "content": "c"}], "d", votes={"tone": (1, 0)}),
]


def test_rows_are_known_by_content_and_order() -> None:
    digest = rows_digest(ROWS)
    assert rows_digest([replace(ROWS[0], levels={"size": 0, "tone": 1}), ROWS[1]]) == digest
    others = [ROWS[::-1], ROWS[:1], [*ROWS, ROWS[0]], [replace(ROWS[0], levels={"tone": 0, "size": 0}), ROWS[1]]]
    others += [[replace(ROWS[0], rejected="x"), ROWS[1]], [ROWS[0], replace(ROWS[1], votes={"tone": (0, 0)})]]
    assert digest not in {rows_digest(rows) for rows in others}


def test_a_tokenizer_is_known_by_its_pipeline_not_by_its_last_call() -> None:
    tokenizer = build_tokenizer()
    before = vocabulary_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert vocabulary_digest(tokenizer) == before
    tokenizer.add_tokens(["another"])
    assert vocabulary_digest(tokenizer) != before
