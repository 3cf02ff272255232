import pytest
import torch

from moslim.evaluation.classifier_measures import proxy_and_gold
from moslim.utils.files import plain
from tests.helpers.scored_rows import Rows

NAMES = ("two", "three")


def test_proxy_and_gold_of_the_answers_that_were_asked_for_a_level_and_labelled(rows: Rows) -> None:
    """Every prediction is 0.8 sure; head ``three`` gives 0.1 to each other level, head ``two`` 0.2 to its other."""
    scored = rows(
        levels=[[1, 0], [1, 2], [-1, 2], [0, 1]],
        predicted=[[1, 0], [0, 2], [1, 1], [0, 0]],
        requested=[[1, -1], [1, 0], [1, 2], [-1, 1]],
    )
    found = plain(proxy_and_gold(scored, NAMES))
    two, three = (found["dimensions"][name] for name in NAMES)
    assert (two["n_rows"], two["proxy"], two["gold"]) == (2, pytest.approx((0.8 + 0.2) / 2), 1.0)
    assert (three["n_rows"], three["gold"]) == (3, pytest.approx(2 / 3, abs=1e-6))
    assert three["proxy"] == pytest.approx((0.1 + 0.1 + 0.1) / 3)
    assert (two["gap"], three["gap"]) == (pytest.approx(-0.5), pytest.approx(0.1 - 2 / 3, abs=1e-6))
    mean = found["mean"]
    assert mean["n_rows"] == 4 and mean["gap"] == pytest.approx((-0.5 + 0.1 - 2 / 3) / 2, abs=1e-6)
    assert mean["gap"] == pytest.approx(mean["proxy"] - mean["gold"], abs=2e-6)


def test_gold_is_the_share_of_raters_who_saw_the_level(rows: Rows) -> None:
    scored = rows(levels=[[1, 0]], predicted=[[1, 0]], requested=[[0, 2]])
    scored.targets[0] = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]])
    found = plain(proxy_and_gold(scored, NAMES))
    assert (found["dimensions"]["two"]["gold"], found["dimensions"]["three"]["gold"]) == (0.25, 0.5)
    assert found["mean"]["gap"] == pytest.approx((0.2 - 0.25 + 0.1 - 0.5) / 2)
    assert found["mean"]["interval"] == [None, None]  # one question says nothing of the spread


def test_the_interval_is_over_questions(rows: Rows) -> None:
    """Two questions with gaps of 0.8 and -0.2: a resample is all one, all the other or half and half."""
    scored = rows(
        levels=[[0, 0]] * 2 + [[1, 0]] * 2, predicted=[[1, 0]] * 4, requested=[[1, -1]] * 4, question=[3, 3, 8, 8]
    )
    found = plain(proxy_and_gold(scored, NAMES))
    assert found["dimensions"]["two"]["gap"] == pytest.approx(0.3)
    assert found["dimensions"]["two"]["interval"] == pytest.approx([-0.2, 0.8])
    assert found["mean"]["interval"] == pytest.approx([-0.2, 0.8])
    assert found["dimensions"]["three"]["gap"] is None


def test_nothing_asked(rows: Rows) -> None:
    assert proxy_and_gold(rows(levels=[[0, 0]], predicted=[[0, 0]]), NAMES) is None
    assert proxy_and_gold(rows(levels=[[-1, 0]], predicted=[[0, 0]], requested=[[1, -1]]), NAMES) is None
