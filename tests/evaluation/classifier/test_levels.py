from math import isnan, sqrt

import pytest
import torch

from moslim.evaluation.classifier_measures import (
    LabelledRows,
    auroc,
    level_intervals,
    level_measures,
    majority_baseline,
    recall,
)
from moslim.evaluation.classifier_records import ScoredRows


def test_measures_of_three_levels_by_hand(six: ScoredRows) -> None:
    head = LabelledRows.of(six, 1, 3)
    assert head.confusions().sum(0).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    found = {name: value.item() for name, value in level_measures(head).items()}
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert found["within_one"] == pytest.approx(5 / 6)
    assert found["mae"] == pytest.approx((1 + 2) / 6)
    # labels 2 2 2, predictions 2 3 1: by chance 2 * (2 * 5 + 3 * 2 + 1 * 5) / 6 = 7 squares, found 1 + 4
    assert found["kappa"] == pytest.approx(1 - 5 / 7)
    assert found["macro_f1"] == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    # expected levels 0.3 1 1 1 1.7 0.3: ranks less their mean -2 0.5 0.5 0.5 2.5 -2, those of labels -2 -2 0 0 2 2
    assert found["spearman"] == pytest.approx(4 / sqrt(15 * 16))
    assert isnan(found["auroc"])
    assert recall(head.confusions().sum(0)).tolist() == [0.5, 1, 0.5]


def test_unlabelled_rows_do_not_count_and_two_levels_have_an_auroc(six: ScoredRows) -> None:
    head = LabelledRows.of(six, 0, 2)
    found = level_measures(head)
    assert len(head.levels) == 5 and found["accuracy"] == 3 / 5
    # negatives 0.2 0.8, positives 0.8 0.2 0.8: pairs 1 + 1/2, 1/2 + 0, 1 + 1/2 of 6
    assert found["auroc"] == pytest.approx(3.5 / 6)


def test_auroc_by_hand() -> None:
    positive = torch.tensor([False, False, True, True])
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), positive) == 0.75
    assert auroc(torch.tensor([0.5, 0.5, 0.5, 0.5]), positive) == 0.5
    assert auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.ones(4).bool()).isnan()


def test_a_weight_in_auroc_is_a_repetition() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(10, (40,), generator=generator) / 10
    positive = torch.rand(40, generator=generator) < scores
    weights = torch.randint(3, (5, 40), generator=generator)
    repeated = [auroc(scores.repeat_interleave(w), positive.repeat_interleave(w)) for w in weights]
    torch.testing.assert_close(auroc(scores, positive, weights.float()), torch.stack(repeated))


def test_intervals_are_over_questions(rows) -> None:
    """One question is all right and one all wrong: a resample has either, or both."""
    right, wrong = [[1, 2], [0, 0]] * 20, [[0, 0], [1, 2]] * 20
    scored = rows(levels=right + right, predicted=right + wrong, question=[1] * 40 + [2] * 40)
    for head, size in enumerate((2, 3)):
        found = {name: ends.tolist() for name, ends in level_intervals(LabelledRows.of(scored, head, size)).items()}
        assert found["accuracy"] == [0, 1]
        assert found["kappa"] == [-1, 1]
        assert found["within_one"] == ([1, 1] if size == 2 else [0, 1])
        assert ("auroc" in found) == (size == 2)
    assert level_intervals(LabelledRows.of(scored, 0, 2))["auroc"].tolist() == [0, 1]


def test_a_head_without_labels_has_nothing(rows) -> None:
    head = LabelledRows.of(rows(levels=[[-1, 0]], predicted=[[0, 0]]), 0, 2)
    assert all(value.isnan() for value in level_measures(head).values())
    assert all(ends.isnan().all() for ends in level_intervals(head).values())
    assert majority_baseline(head) == {"level": None, "accuracy": None, "within_one": None}


def test_labels_of_one_level_have_no_correlation(rows) -> None:
    found = level_measures(LabelledRows.of(rows(levels=[[1, 1]] * 3, predicted=[[1, 0], [1, 1], [0, 2]]), 1, 3))
    assert found["spearman"].isnan()
    assert found["accuracy"] == found["balanced_accuracy"] == 1 / 3


def test_majority(six: ScoredRows, rows) -> None:
    assert majority_baseline(LabelledRows.of(six, 0, 2)) == {"level": 1, "accuracy": 3 / 5, "within_one": 1}
    scored = rows(levels=[[0, 0], [0, 2], [0, 2]], predicted=[[0, 0]] * 3)
    assert majority_baseline(LabelledRows.of(scored, 1, 3)) == {"level": 2, "accuracy": 2 / 3, "within_one": 2 / 3}
