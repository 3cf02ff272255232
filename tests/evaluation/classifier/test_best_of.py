import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moslim.data.types import Question
from moslim.evaluation.best_of import BestOf, Candidates, Score, best_of_n, correct_choices, read_choices
from moslim.mapping import ExpectedDistance, MappingFunction, TargetProbability
from moslim.preferences import PreferenceSet
from moslim.utils.files import Result, plain
from moslim.workbench.answers import best_of_records
from moslim.workbench.grammar import LEVELS, TOPICS, gold_levels
from tests.helpers.scored_rows import PREFERENCES

WORLD = PreferenceSet(LEVELS)
LINE: dict[str, Any] = {"question": "q", "answers": ["a", "b"], "preference": {"three": 2}, "right": 1}


def certain(levels: Sequence[Sequence[int]], width: int) -> Tensor:
    return F.one_hot(torch.tensor(levels), width).float()


def gold(questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
    """A classifier that is always right."""
    found = [gold_levels(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return certain([[levels[name] for name in WORLD.names] for levels in found], 5)


def found_by(path: str, score: Score, preferences: PreferenceSet, mapping: MappingFunction | None = None) -> Result:
    best_of = BestOf(path, mapping)
    return plain(best_of(best_of.choices(preferences), score, preferences))


def write(folder: Path, *lines: dict[str, Any] | str) -> str:
    path = folder / "choices.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


MAPPINGS = [ExpectedDistance(), TargetProbability("group"), TargetProbability("batch"), TargetProbability()]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=["distance", "group", "batch", "running"])
def test_the_highest_reward_wins_and_a_tie_is_shared(mapping) -> None:
    levels = [[[0, 2], [1, 2]], [[0, 0], [1, 1]], [[0, 1], [1, 1]]]  # three prompts, two answers
    probs = torch.stack([certain(answers, 3) for answers in levels])
    targets = torch.tensor([[1, -1], [-1, 1], [-1, 1]])
    mapping.bind(PreferenceSet({"size": ["s", "m", "l"], "heat": ["c", "w", "h"]}))
    assert correct_choices(probs, targets, torch.tensor([1, 0, 0]), mapping).tolist() == [1, 0, 0.5]


def test_paraphrases_are_counted_apart() -> None:
    target = torch.tensor([1, -1])
    choices = [
        Candidates(("a", "a1", "a2"), ("x", "y"), target, 1),
        Candidates(("b", "b1"), ("x", "y"), target, 0),
        Candidates(("c",), ("x", "y"), target, 0),
    ]
    picked = [1, 1, 0, 0, 0, 1]  # which answer is seen as level 1 of the first dimension, form by form
    probs = torch.stack([certain([[int(p == i), 0] for i in (0, 1)], 3) for p in picked])
    found = plain(best_of_n(choices, probs, ExpectedDistance()))
    assert found == {
        "n_prompts": 3,
        "n_answers": 2,
        "chance": 0.5,
        "accuracy": pytest.approx(2 / 3, abs=1e-6),  # a and b; c is wrong
        "interval": [0, 1],
        "paraphrases": {"n": 3, "accuracy": pytest.approx(2 / 3, abs=1e-6), "every": pytest.approx(1 / 3, abs=1e-6)},
    }


def test_without_paraphrases(tmp_path: Path) -> None:
    path = write(tmp_path, LINE, {**LINE, "question": [{"role": "user", "content": "q"}], "right": 0})
    found = found_by(path, lambda q, a: certain([[0, int(text == "b") * 2] for text in a], 3), PREFERENCES)
    assert (found["accuracy"], found["paraphrases"], found["mapping"]) == (0.5, None, "ExpectedDistance")


@pytest.mark.parametrize("mapping", [None, TargetProbability("group")], ids=["default", "paper"])
def test_the_embedded_world_is_exact(mapping, tmp_path: Path) -> None:
    records = best_of_records(TOPICS, 150, random.Random(0))
    assert records == best_of_records(TOPICS, 150, random.Random(0))
    assert {len(record["preference"]) for record in records} == {1, 2}
    for record in records:
        assert len({record["question"], *record["paraphrases"]}) == 3
        found = [gold_levels(record["question"], answer) for answer in record["answers"]]
        fits = [all(levels[k] == v for k, v in record["preference"].items()) for levels in found]
        assert [i for i, fit in enumerate(fits) if fit] == [record["right"]]
    path = write(tmp_path, *records)
    right = found_by(path, gold, WORLD, mapping)
    assert (right["accuracy"], right["n_answers"], right["n_prompts"]) == (1, 4, 150)
    assert right["paraphrases"] == {"n": 300, "accuracy": 1, "every": 1}
    blind = found_by(path, lambda q, a: torch.full((len(q), 4, 5), 0.2), WORLD, mapping)
    assert blind["accuracy"] == blind["chance"] == 0.25 and blind["paraphrases"]["every"] == 0


def test_a_classifier_that_is_fooled_by_the_wording_loses_every_paraphrase(tmp_path: Path) -> None:
    records = best_of_records(TOPICS, 40, random.Random(1), paraphrases=1)
    asked = {record["question"] for record in records}

    def fooled(questions: Sequence[Question], answers: Sequence[str]) -> Tensor:
        known = torch.tensor([question in asked for question in questions])[:, None, None]
        return gold(questions, answers).where(known, 0.2)

    for record in records:
        record["paraphrases"] = [f"Tell me: {text}" for text in record["paraphrases"]]
    found = found_by(write(tmp_path, *records), fooled, WORLD)
    assert found["accuracy"] == 1
    assert found["paraphrases"] == {"n": 40, "accuracy": 0.25, "every": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, "line 2: the question is 3: give a text"),
        ({"question": ["q"]}, "line 2: message 0 of a question is 'q'"),
        ({"question": []}, "line 2: a question must end with a user turn"),
        ({"paraphrases": ["p", None]}, "line 2: the question is None"),
        ({"answers": ["a"]}, r"line 2: field 'answers' is \['a'\]: give two or more texts"),
        ({"answers": ["a", "b", "c"]}, "line 2: 3 answers, where the first line has 2"),
        ({"preference": {}}, "line 2: field 'preference' is {}"),
        ({"preference": {"four": 1}}, "line 2: no dimension 'four'; there are: two, three"),
        ({"preference": {"three": 3}}, r"line 2: level 3 of dimension 'three' is outside 0\.\.2"),
        ({"preference": {"three": True}}, "line 2: field 'preference.three' is True: give a whole number"),
        ({"right": 2}, "line 2: field 'right' is 2: give 0 to 1"),
        ({"right": None}, "line 2: field 'right' is None"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(change, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"choices.jsonl, {message}"):
        read_choices(write(tmp_path, LINE, {**LINE, **change}), PREFERENCES)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"best_of\.path: there is no file 'none\.jsonl'"):
        read_choices("none.jsonl", PREFERENCES)
    with pytest.raises(ValueError, match=r"choices\.jsonl: the table has no rows: the file is empty"):
        read_choices(write(tmp_path), PREFERENCES)
    with pytest.raises(ValueError, match=r"choices\.jsonl, line 1: not JSON"):
        read_choices(write(tmp_path, "{"), PREFERENCES)
