from math import isnan, nan, sqrt

import pytest
import torch

from moslim.evaluation.steerability import level_shares, mean_interval, slopes, sweep_measures, sweeps


def test_control_on_a_small_sweep():
    achieved = torch.tensor([[[0.0, 2.0, 2.0]], [[2.0, 1.0, 0.0]]], dtype=torch.float64)  # two questions, one sample
    values = {name: value.tolist() for name, value in sweep_measures(achieved).items()}
    assert values == {
        "exact": [[1, 0, 1], [0, 1, 0]],
        "within_one": [[1, 1, 1], [0, 1, 0]],
        "mae": [[0, 1, 0], [2, 0, 2]],
        "spearman": [[pytest.approx(1.5 / sqrt(3))], [pytest.approx(-1)]],  # ranks 1 2.5 2.5 against 1 2 3
        "monotonicity": [[1, 1], [0, 0]],
        "dynamic_range": [[2], [-2]],
    }


def test_control_leaves_out_what_was_not_judged():
    values = sweep_measures(torch.tensor([[[0.0, nan, 1.0]]], dtype=torch.float64))
    means = {name: value.nanmean().item() for name, value in values.items()}
    assert means["exact"] == 0.5
    assert means["within_one"] == 1.0
    assert means["mae"] == 0.5
    assert means["spearman"] == pytest.approx(1.0)
    assert isnan(means["monotonicity"])  # both pairs touch the missing level
    assert means["dynamic_range"] == 1.0


def test_a_level_between_integers_counts_as_the_nearer():
    values = sweep_measures(torch.tensor([[[0.4, 1.6, 0.6]]], dtype=torch.float64))
    assert values["exact"].tolist() == [[1, 0, 0]]
    assert values["within_one"].tolist() == [[1, 1, 1]]


def test_slopes_per_question_and_dimension():
    own = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    other = torch.tensor([[2.0, 2.0, 0.0], [nan, 0.0, 3.0]], dtype=torch.float64)
    achieved = torch.stack([own, other], dim=-1)[:, None]  # [Q, S = 1, K, D]
    assert slopes(achieved).tolist() == [[1.0, -1.0], [0.0, 3.0]]


def test_slope_of_one_request_is_not_defined():
    assert slopes(torch.tensor([[[[nan], [1.0], [nan]]]])).isnan().all()


def test_level_shares():
    achieved = torch.tensor([[[0.0, 1.0], [1.0, nan]], [[0.0, 1.0], [0.0, 0.0]]])
    shares = level_shares(achieved)
    assert shares[0].tolist() == [0.75, 0.25]
    assert shares[1].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_sweeps_put_answers_where_they_belong(trained):
    warmth, length = sweeps(trained, (3, 2))
    assert warmth.swept.tolist() == [[[0, 1, 2]], [[1, 1, 1]]]
    assert warmth.achieved[0, 0, :, 1].tolist() == [0, 0, 1]
    assert length.swept.tolist() == [[[0, 1]], [[1, 0]]]
    assert warmth.p_target[1, 0].tolist() == pytest.approx([0, 0.9, 0])


def test_sweeps_mark_missing_answers(make):
    rows = [(7, 0, "sweep", [0, -1], [0.0, 0.0]), (7, 3, "sweep", [2, -1], [nan, 0.0])]
    warmth, length = sweeps(make(rows), (3, 2))
    assert warmth.swept.shape == (1, 2, 3)
    assert warmth.swept.isnan().tolist() == [[[False, True, True], [True, True, True]]]
    assert warmth.p_target[0, 1, 2].isnan()  # the classifier has an opinion, the judge has none
    assert length.swept.isnan().all()


def test_a_sweep_prompt_moves_one_dimension(make):
    with pytest.raises(ValueError, match="exactly one dimension"):
        sweeps(make([(0, 0, "sweep", [1, 1], [1.0, 1.0])]), (3, 2))


def test_bootstrap_draws_questions():
    # The mean of two questions with values 0 and 1 is 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4.
    assert mean_interval([torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)]) == (0.0, 1.0)
    alike = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert mean_interval([alike]) == (0.5, 0.5)


def test_bootstrap_is_seeded_and_narrows():
    values = torch.rand(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_interval([values])
    assert (low, high) == mean_interval([values])
    assert (low, high) != mean_interval([values], seed=1)
    # Standard error of 200 question means: sqrt(1/12/4/200) = 0.0102
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * sqrt(1 / 9600), rel=0.15)


def test_bootstrap_of_one_question_is_not_defined():
    assert all(map(isnan, mean_interval([torch.ones(1, 3, dtype=torch.float64)])))
