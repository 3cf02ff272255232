from math import isnan, nan, sqrt

import pytest
import torch
from torch import Tensor

from moslim.evaluation import classifier_records as statistics
from moslim.evaluation.classifier_records import average_ranks, bootstrap_interval, rank_correlation

LEVELS = torch.arange(5.0, dtype=torch.float64)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_average_ranks_share_ties_and_skip_nan():
    ranks = average_ranks(row(3.0, 1.0, 3.0, nan, 0.0))
    assert ranks[[0, 1, 2, 4]].tolist() == [3.5, 2.0, 3.5, 1.0]
    assert isnan(ranks[3])


@pytest.mark.parametrize(
    ("achieved", "expected"),
    [
        ((0, 1, 2, 3, 4), 1.0),
        ((4, 3, 2, 1, 0), -1.0),
        ((2, 2, 2, 2, 2), 0.0),
        ((0, 0, 1, 1, 2), 9 / sqrt(90)),  # ranks 1.5 1.5 3.5 3.5 5
        ((0, 4, 1, 3, 2), 0.3),  # 1 - 6 * (0 + 9 + 1 + 0 + 4) / (5 * 24)
        ((0, nan, 2, 1, nan), 0.5),  # ranks 1 2 3 against 1 3 2
        ((nan, 1, nan, 1, nan), 0.0),
    ],
)
def test_rank_correlation(achieved, expected):
    assert rank_correlation(LEVELS, row(*achieved)).item() == pytest.approx(expected)


def test_rank_correlation_of_one_point_is_not_defined():
    assert isnan(rank_correlation(LEVELS, row(nan, nan, 3, nan, nan)).item())


def test_rank_correlation_with_ties_on_both_sides():
    # ranks 1.5 1.5 3.5 3.5 against 1 2.5 2.5 4: covariance 1.5 + 0 + 0 + 1.5 over sqrt(4 * 4.5)
    assert rank_correlation(row(0, 0, 1, 1), row(0, 1, 1, 2)).item() == pytest.approx(3 / sqrt(18))


def test_interval_of_a_two_question_mean():
    # The mean of 0 and 1 over two drawn questions is 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4.
    values = row(0, 1)
    assert bootstrap_interval(lambda weights: weights @ values / 2, 2).tolist() == [0, 1]


def test_every_resample_draws_as_many_questions_as_there_are():
    def totals(weights: Tensor) -> Tensor:
        assert weights.sum(dim=1).eq(7).all()
        return weights

    assert bootstrap_interval(totals, 7).shape == (2, 7)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    values = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = bootstrap_interval(lambda weights: weights @ values, 50)
    monkeypatch.setattr(statistics, "_MAX_COUNTS", 50 * 30)
    assert torch.equal(bootstrap_interval(lambda weights: weights @ values, 50), whole)


def test_undefined_resamples_are_left_out():
    values = bootstrap_interval(lambda weights: weights[:, 0].div(weights[:, 0]), 3)
    assert values.tolist() == [1, 1]  # 0/0 where the first question is not drawn


@pytest.mark.parametrize("questions", [0, 1])
def test_too_few_questions_have_no_interval(questions):
    ends = bootstrap_interval(lambda weights: weights.sum(dim=1), questions)
    assert ends.isnan().tolist() == [True, True]
