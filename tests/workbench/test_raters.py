import random
from collections import Counter

import pytest

from moslim.data.sources.workbench import Workbench
from moslim.data.types import Example, RowKind, Split, agreed_level
from moslim.preferences import PreferenceSet
from moslim.workbench.answers import rate
from moslim.workbench.grammar import LEVELS

PREFERENCES = PreferenceSet(LEVELS)
SMALL = {"reward_rows": 200, "bare_rows": 50}


def rows(split=Split.TRAIN, seed=0, **options):
    return Workbench(**SMALL, **options).rows(RowKind.LABELLED, split, PREFERENCES, seed)


@pytest.mark.parametrize(
    ("votes", "level"), [((3,), 3), ((0, 1), 0), ((1, 2, 2), 2), ((0, 0, 4), 1), ((2, 3), 2), ((0, 1, 1, 1), 1)]
)
def test_votes_come_to_the_nearest_level_and_to_the_lower_of_two(votes, level):
    assert agreed_level(votes) == level


def test_raters_err_as_often_as_a_rounded_normal_error():
    rng = random.Random(0)
    row = rate(Example("q", "a", {"warmth": 2}), 20_000, 0.7, rng)
    shares = {level: count / 20_000 for level, count in Counter(row.votes["warmth"]).items()}
    assert shares[2] == pytest.approx(0.525, abs=0.015)  # P(|N(0, 0.7)| < 0.5)
    assert shares[1] == pytest.approx(0.221, abs=0.015) and shares[3] == pytest.approx(0.221, abs=0.015)
    assert row.levels == {"warmth": 2}


def test_levels_are_clipped_and_one_rater_leaves_no_votes():
    row = rate(Example("q", "a", {"warmth": 0, "verbosity": 4}), 50, 30.0, random.Random(0))
    assert min(map(min, row.votes.values())) == 0 and max(map(max, row.votes.values())) == 4
    alone = rate(Example("q", "a", {"warmth": 0}), 1, 0.0, random.Random(0))
    assert (alone.levels, alone.votes) == ({"warmth": 0}, {})


def test_without_noise_raters_agree_with_the_gold_scorer():
    exact = rows()
    rated = rows(raters=3, rater_noise=0.0)
    assert [row.levels for row in rated] == [dict(row.levels) for row in exact]
    assert all(row.votes == {name: (level,) * 3 for name, level in row.levels.items()} for row in rated)


def test_noise_changes_labels_of_training_rows_and_nothing_else():
    exact, rated = rows(), rows(raters=3)
    assert [(row.question, row.answer, row.stage) for row in rated] == [
        (row.question, row.answer, row.stage) for row in exact
    ]
    assert all(dict(row.levels) == {name: agreed_level(v) for name, v in row.votes.items()} for row in rated)
    agreement = sum(a.levels == b.levels for a, b in zip(exact, rated, strict=True)) / len(exact)
    assert 0.05 < agreement < 0.6
    for split in (Split.VALIDATION, Split.TEST):
        assert rows(split, raters=3) == rows(split)


def test_votes_follow_from_the_seed():
    assert rows(raters=2) == rows(raters=2)
    assert [row.votes for row in rows(raters=2)] != [row.votes for row in rows(raters=2, seed=1)]


def test_negative_raters_or_noise_are_an_error():
    for options in ({"raters": -1}, {"rater_noise": -0.1}):
        with pytest.raises(ValueError, match="neither can be negative"):
            Workbench(**options)
