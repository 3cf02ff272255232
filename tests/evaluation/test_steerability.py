import json
import time
from dataclasses import replace

import pytest
import torch

from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.steerability import MEASURES, Records, measures, steerability
from moslim.preferences import PreferenceSet

GOLD = JudgeInfo("gold", proxy=False)


@pytest.fixture
def result(trained, starting, preferences):
    return steerability(trained, starting, preferences, GOLD, {"seed": 0, "lr": 1e-8})


def test_keys(result):
    assert set(result) >= {
        *("schema", "judge", "dimensions", "mean", "base", "combinations", "cross_talk"),
        *("default_quality", "n_questions", "config"),
    }
    assert result["schema"] == 1
    assert result["judge"] == {"name": "gold", "proxy": False}
    assert list(result["dimensions"]) == ["warmth", "length"]
    for part in (result, result["base"]):
        assert set(part["mean"]) == set(MEASURES)
        assert all(set(values) == set(MEASURES) for values in part["dimensions"].values())
    assert set(result["combinations"]) == {"seen", "unseen"}
    assert result["config"] == {"seed": 0, "lr": 1e-8}
    assert result["n_questions"] == 2


def test_json_has_no_nan(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_measures_of_the_trained_policy(result):
    assert result["dimensions"] == {
        "warmth": {
            "exact": 0.666667,
            "within_one": 1.0,
            "mae": 0.333333,
            "spearman": 0.5,
            "monotonicity": 1.0,
            "dynamic_range": 1.0,
        },
        "length": {
            "exact": 0.5,
            "within_one": 1.0,
            "mae": 0.5,
            "spearman": 0.0,
            "monotonicity": 0.5,
            "dynamic_range": 0.0,
        },
    }
    assert result["mean"] == {
        "exact": 0.583333,
        "within_one": 1.0,
        "mae": 0.416667,
        "spearman": 0.25,
        "monotonicity": 0.75,
        "dynamic_range": 0.5,
    }


def test_a_constant_policy_has_no_control(result):
    mean = result["base"]["mean"]
    assert (mean["spearman"], mean["dynamic_range"], mean["monotonicity"]) == (0.0, 0.0, 1.0)
    assert (mean["exact"], mean["mae"]) == (0.416667, 0.583333)  # (1/3 + 1/2) / 2 and (2/3 + 1/2) / 2


def test_combinations(result):
    assert result["combinations"]["seen"] == {"joint_exact": 0.5, "mae": 0.5, "n_answers": 2}
    assert result["combinations"]["unseen"] is None
    assert result["base"]["combinations"]["seen"] == {"joint_exact": 0.0, "mae": 1.0, "n_answers": 2}


def test_combinations_ignore_dimensions_that_were_not_asked_for(make, starting, preferences):
    rows = make([(0, 0, "unseen", [2, -1], [2.0, 0.0]), (0, 1, "unseen", [2, -1], [float("nan"), 0.0])])
    joint = steerability(rows, starting, preferences, GOLD, {})["combinations"]["unseen"]
    assert joint == {"joint_exact": 1.0, "mae": 0.0, "n_answers": 2}


def test_cross_talk(result):
    assert result["cross_talk"] == [[0.5, 0.25], [-0.5, 0.0]]
    assert result["cross_talk_normalised"] == [[1.0, 0.5], [None, None]]  # length has no gain to compare with
    assert result["interference"] == 0.5


def test_reward_compares_proxy_and_gold_on_the_same_answers(result):
    reward = result["reward"]
    assert reward["proxy"] == {"before": 0.416667, "after": 0.525}  # after: (0.9 * 4/6 + 0.9 * 2/4) / 2
    assert reward["gold"] == {"before": 0.416667, "after": 0.583333}
    assert reward["gap"] == {"before": 0.0, "after": -0.058333}
    assert reward["dimensions"]["warmth"]["proxy"] == {"before": 0.333333, "after": 0.6}


def test_default_quality(result):
    assert result["default_quality"] == {
        "before": {"warmth": 1.0, "length": 0.0},
        "after": {"warmth": 1.5, "length": 0.5},
    }


def test_curves(result):
    curve = result["curves"]["warmth"]
    assert curve["requested"] == ["cold", "neutral", "warm"]
    assert curve["policy"] == [0.5, 1.0, 1.5]
    assert curve["base"] == [1.0, 1.0, 1.0]
    assert curve["shares"] == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]


def test_order_and_repeats_do_not_matter(result, trained, starting, preferences):
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(3))
    parts = [trained.select(order[:4]), trained.select(order[4:]), trained.select(order[:2])]
    shuffled = steerability(Records.concat(parts), starting.select(order), preferences, GOLD, result["config"])
    assert json.dumps(shuffled) == json.dumps(result)


def test_what_was_not_judged_is_null(trained, starting, preferences):
    blind = replace(trained, achieved=torch.full_like(trained.achieved, torch.nan))
    result = steerability(blind, starting, preferences, GOLD, {})
    assert set(result["mean"].values()) == {None}
    assert result["reward"]["gap"]["after"] is None
    assert result["combinations"]["seen"]["joint_exact"] is None
    json.dumps(result, allow_nan=False)


def test_only_some_kinds_were_asked_for(trained, starting, preferences):
    result = steerability(trained.of_kind("default"), starting.of_kind("sweep"), preferences, GOLD, {})
    assert result["mean"]["spearman"] is None
    assert result["base"]["mean"]["spearman"] == 0.0
    assert result["default_quality"]["before"] == {"warmth": None, "length": None}


def test_measures_alone_agree(result, trained, preferences):
    assert measures(trained, preferences) == {"dimensions": result["dimensions"], "mean": result["mean"]}


def test_other_dimensions_are_refused(trained, starting):
    with pytest.raises(ValueError, match="records of 'policy' have 2 dimensions, but `preferences` has 1"):
        steerability(trained, starting, PreferenceSet({"warmth": ["cold", "warm"]}), GOLD, {})


def test_ten_thousand_answers_take_less_than_a_second(preferences):
    generator = torch.Generator().manual_seed(0)
    prompts = [[level, -1] for level in range(3)] + [[-1, level] for level in range(2)]
    questions, samples = 500, 4
    n = questions * samples * len(prompts)
    records = Records(
        question=torch.arange(questions).repeat_interleave(samples * len(prompts)),
        sample=torch.arange(samples).repeat_interleave(len(prompts)).repeat(questions),
        kinds=["sweep"] * n,
        targets=torch.tensor(prompts).repeat(questions * samples, 1),
        achieved=torch.randint(0, 2, (n, 2), generator=generator).float(),
        probs=torch.full((n, 2, 3), 0.5),
    )
    start = time.process_time()
    result = steerability(records, records, preferences, GOLD, {})
    assert time.process_time() - start < 1.0
    assert abs(result["mean"]["spearman"]) < 0.05  # random answers
