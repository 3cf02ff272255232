import re
from pathlib import Path

import pytest
import torch
import yaml

from moslim.preferences import INACTIVE, Dimension, Preference, PreferenceSet
from moslim.utils.errors import UsageError

PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"], "heat": ["cold", "hot"]})


def test_encode_marks_what_is_not_asked_for_and_decode_undoes_it():
    target = PREFERENCES.encode(Preference({"heat": 1}))
    assert target.tolist() == [INACTIVE, 1]
    assert PREFERENCES.decode(target) == Preference({"heat": 1})
    assert PREFERENCES.decode(PREFERENCES.encode(Preference())) == Preference()


def test_order_sizes_and_plain_data():
    assert PREFERENCES.names == ("size", "heat")
    assert PREFERENCES.sizes == (3, 2)
    assert PreferenceSet(PREFERENCES.to_dict()) == PREFERENCES
    assert PreferenceSet({"heat": ["cold", "hot"], "size": ["low", "mid", "high"]}) != PREFERENCES


def test_equal_preferences_hash_equally_whatever_their_order():
    one, other = Preference({"size": 1, "heat": 0}), Preference({"heat": 0, "size": 1})
    assert one == other
    assert len({one, other}) == 1
    assert not Preference()
    assert Preference({"size": 0})


@pytest.mark.parametrize(
    ("preference", "error", "text"),
    [
        ({"weight": 0}, UsageError, "no dimension 'weight'; there are: size, heat"),
        ({"size": 3}, ValueError, "level 3 of dimension 'size' is outside 0..2"),
        ({"heat": -1}, ValueError, "level -1 of dimension 'heat' is outside 0..1"),
    ],
)
def test_encode_refuses_what_does_not_exist(preference, error, text):
    with pytest.raises(error, match=text):
        PREFERENCES.encode(Preference(preference))


def test_dimensions_need_two_different_levels():
    with pytest.raises(ValueError, match="give at least two"):
        Dimension("size", ("only",))
    with pytest.raises(ValueError, match="names a level twice"):
        Dimension("size", ("low", "low"))
    with pytest.raises(ValueError, match="at least one dimension"):
        PreferenceSet({})


def test_dimensions_are_matched_by_name():
    more = PreferenceSet({"heat": ["cold", "hot"], "smell": ["a", "b"], "size": ["low", "mid", "high"]})
    assert PREFERENCES.columns_in(more, "classifier") == [2, 0]
    with pytest.raises(ValueError, match="dimension 'smell' is unknown to the classifier, which has: size, heat"):
        more.columns_in(PREFERENCES, "classifier")


@pytest.mark.parametrize("levels", [["a", "b"], ["high", "mid", "low"], ["mid", "low", "high"], ["Low", "mid", "high"]])
def test_other_levels_and_another_order_of_levels_are_refused(levels):
    other = PreferenceSet({"size": levels, "heat": ["cold", "hot"]})
    text = f"'size' has the levels ['low', 'mid', 'high'] in `preferences`, but {levels} in the judge: a level is known"
    with pytest.raises(UsageError, match=re.escape(text)):
        PREFERENCES.columns_in(other, "judge")


@pytest.mark.parametrize("path", sorted(Path("configs/preferences").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_preferences_load(path):
    preferences = PreferenceSet(**yaml.safe_load(path.read_text()))
    for d, size in enumerate(preferences.sizes):
        top = preferences.encode(Preference({preferences.names[d]: size - 1}))
        assert torch.equal(top == INACTIVE, torch.arange(len(preferences)) != d)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "mean",
            "total",
            "pairs",
            "weighted",
            "calibration",
            "requests",
            "best_of",
            "base",
            "reward",
            "seen",
            "unseen",
        ),
        *(
            "",
            " ",
            " size",
            "size ",
            "a/b",
            "a.b",
            "a\nb",
            "a\tb",
            "a\u200bb",
            "a\0",
            "[[size",
            "size]]",
            "size]",
            "[size",
        ),
    ],
)
def test_names_that_metrics_or_prompts_would_mistake_are_refused(name):
    with pytest.raises(ValueError, match=r"(?s)dimension"):
        PreferenceSet({name: ["low", "high"]})


@pytest.mark.parametrize("level", ["", " ", " low", "low\n", "a\nb", "]]", "a]]b", "[[a", "a]", "[a", "a\u2028b"])
def test_levels_that_would_break_a_prompt_are_refused(level):
    with pytest.raises(ValueError, match=r"(?s)level .* of dimension 'size'"):
        PreferenceSet({"size": [level, "high"]})


def test_names_that_differ_in_case_or_white_space_only_are_refused():
    for names in (["size", "Size"], ["big  one", "big one"], ["caf\u00e9", "cafe\u0301"], ["\uff53ize", "size"]):
        with pytest.raises(ValueError, match=r"preferences: dimensions .* differ in case or white space only"):
            PreferenceSet({name: ["low", "high"] for name in names})
        with pytest.raises(ValueError, match=r"dimension 'x': levels .* differ in case or white space only"):
            PreferenceSet({"x": names})


def test_names_that_are_no_texts():
    assert PreferenceSet({1: [0, 10], "two": ["a", 2]}).to_dict() == {"1": ["0", "10"], "two": ["a", "2"]}
    for name in (True, None, 1.5):
        with pytest.raises(ValueError, match=r"preferences.dimensions: .* put it in quotes"):
            PreferenceSet({name: ["low", "high"]})
        with pytest.raises(ValueError, match=r"preferences.dimensions.size: .* put it in quotes"):
            PreferenceSet({"size": ["low", name]})
    with pytest.raises(ValueError, match="'low' is not a list: give a list"):
        PreferenceSet({"size": "low"})
    for size in ({}, {"size": []}, {"size": ["one"]}):
        with pytest.raises(ValueError, match=r"(at least one dimension|at least two)"):
            PreferenceSet(size)


def test_usual_names_stay_valid():
    PreferenceSet(
        {
            "fails_task": ["no", "yes"],
            "no repetition": ["a: b", "c, d"],
            "H\u00f6flichkeit": ["0", "1"],
            "\u0915\u093f": ["x", "y-z"],
        }
    )


def test_levels_are_asked_for_by_name_or_by_number():
    assert PREFERENCES.requested({"size": "high", "heat": 1}).levels == {"size": 2, "heat": 1}
    assert PREFERENCES.requested({"size": "1"}).levels == {"size": 1}
    for asked in ("z", 3, -1, "", "1.0"):
        with pytest.raises(UsageError, match=rf"no level '{asked}'; lowest first, there are: low \(0\), mid \(1\)"):
            PREFERENCES.requested({"size": asked})
    with pytest.raises(UsageError, match="no dimension 'form'; there are: "):
        PREFERENCES.requested({"form": "low"})


def test_a_number_is_a_name_where_levels_are_numbers():
    stars = PreferenceSet({"stars": ["1", "2", "3"]})
    assert stars.requested({"stars": 3}).levels == {"stars": 2}
    with pytest.raises(UsageError, match="no level '0'; lowest first, there are: 1, 2, 3"):
        stars.requested({"stars": 0})
