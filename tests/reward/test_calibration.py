import math

import pytest
import torch

from moslim.preferences import PreferenceSet
from moslim.reward.heads import (
    brier_score,
    calibrate,
    fit_temperatures,
    level_reliability,
    ranked_probability_score,
    reliability,
    top_reliability,
)

PREFERENCES = PreferenceSet({"two": ["no", "yes"], "four": ["a", "b", "c", "d"]})


def overconfident(rows: int, factor: float, missing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels drawn from true logits, and these logits too large by a factor; ten rows to a question."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 2, 4, generator=generator)
    logits[:, 0, 2:] = -torch.inf
    levels = torch.multinomial(logits.softmax(-1).view(-1, 4), 1, generator=generator).view(rows, 2)
    targets = torch.nn.functional.one_hot(levels, 4).float()
    targets *= torch.rand(rows, 2, 1, generator=generator) >= missing
    return logits * factor, targets, torch.arange(rows) // 10 * 7919 % 1009


def test_scores_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    assert brier_score(probs, targets).item() == pytest.approx((0.25 + 0.09 + 0.04 + 0.25 + 0.25) / 2)
    # cumulated: (.5, .8, 1) against (1, 1, 1), and (0, 0, 1) against (.5, .5, 1)
    assert ranked_probability_score(probs, targets).item() == pytest.approx((0.25 + 0.04 + 0.25 + 0.25) / 2)


def test_ranked_probability_score_knows_the_order_and_brier_does_not() -> None:
    truth = torch.tensor([[1.0, 0.0, 0.0]])
    near, far = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert brier_score(near, truth) == brier_score(far, truth)
    assert ranked_probability_score(near, truth) < ranked_probability_score(far, truth)


def test_bins_have_equal_mass_and_ties_share_one() -> None:
    found = reliability(torch.tensor([0.6, 0.9, 0.7, 0.8]), torch.tensor([1.0, 1.0, 0.0, 1.0]), bins=2)
    torch.testing.assert_close(found.confidence, torch.tensor([0.65, 0.85]))
    torch.testing.assert_close(found.outcome, torch.tensor([0.5, 1.0]))
    assert found.error.item() == pytest.approx((0.15 + 0.15) / 2)
    tied = reliability(torch.full((30,), 0.8), torch.tensor([1.0] * 24 + [0.0] * 6))
    assert tied.share.tolist() == [1.0] and tied.error.item() == pytest.approx(0.0, abs=1e-6)


def test_errors_of_the_top_level_and_of_a_given_one() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]])
    assert top_reliability(probs, targets, bins=2).error.item() == pytest.approx((0.3 + 0.55) / 2)
    assert top_reliability(probs, targets, bins=1).error.item() == pytest.approx(abs(0.75 - 0.625))
    assert level_reliability(probs, targets, 2, bins=1).error.item() == pytest.approx(abs(0.1 - 0.375))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_temperatures_undo_a_factor_on_the_logits(factor: float) -> None:
    logits, targets, _ = overconfident(4000, factor, missing=0.3)
    found = fit_temperatures(logits, targets)
    torch.testing.assert_close(found, torch.full((2,), factor, dtype=torch.float64), rtol=0.1, atol=0)


def test_temperature_has_the_least_likelihood_loss_on_a_grid() -> None:
    logits, targets, _ = overconfident(200, 2.0)
    best = fit_temperatures(logits, targets)

    def loss(temperatures: torch.Tensor) -> torch.Tensor:
        logp = (logits.double() / temperatures[:, None]).log_softmax(-1)
        return -torch.where(targets > 0, logp, 0.0).sum((0, 2))

    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert (loss(best * factor) > loss(best)).all()


def test_few_labels_leave_the_temperature_alone_and_certainty_has_a_bound() -> None:
    logits, targets, questions = overconfident(100, 3.0)
    targets[29:, 0] = 0
    found = fit_temperatures(logits, targets)
    assert found[0] == 1 and found[1] > 2
    with pytest.warns(UserWarning, match="fewer than 30 validation rows are labelled for two:"):
        assert calibrate(logits, targets, questions, PREFERENCES).temperatures == found.tolist()
    always_right = torch.nn.functional.one_hot(torch.arange(100) % 2, 2).double()[:, None]
    assert fit_temperatures(always_right, always_right).item() == pytest.approx(0.1)


def test_votes_are_fitted_as_the_rows_they_stand_for() -> None:
    logits, targets, _ = overconfident(50, 2.0)
    votes = torch.stack([targets, targets.roll(1, 0), targets.roll(2, 0)])
    votes[:, :, 0] = votes[:1, :, 0]
    together = fit_temperatures(logits, votes.mean(0))
    torch.testing.assert_close(together, fit_temperatures(logits.repeat(3, 1, 1), votes.flatten(0, 1)))


def test_calibration_is_measured_on_questions_that_were_not_fitted() -> None:
    logits, targets, questions = overconfident(2000, 4.0)
    found = calibrate(logits, targets, questions, PREFERENCES)
    assert found.temperatures == fit_temperatures(logits, targets).tolist()
    for name in PREFERENCES.names:
        for measure in ("ece", "classwise_ece", "brier", "rps"):
            assert found.measures[f"{name}/{measure}/after"] < found.measures[f"{name}/{measure}/before"]
        assert found.measures[f"{name}/ece/after"] < 0.06 < found.measures[f"{name}/ece/before"]

    held_out = torch.unique(questions, return_inverse=True)[1] % 2 == 1
    assert not set(questions[held_out].tolist()) & set(questions[~held_out].tolist())
    spoilt = targets.clone()
    spoilt[held_out] = spoilt[held_out].roll(1, 0)  # what is measured on must not move the temperature tried there
    again = calibrate(logits, spoilt, questions, PREFERENCES)
    trial = fit_temperatures(logits[~held_out], targets[~held_out])
    probs = (logits[held_out].double() / trial[:, None]).softmax(-1)
    expected = brier_score(probs[:, 1], spoilt[held_out][:, 1].double()).item()
    assert again.measures["four/brier/after"].item() == pytest.approx(expected)


def test_one_question_alone_is_fitted_and_not_measured() -> None:
    logits, targets, _ = overconfident(100, 2.0)
    found = calibrate(logits, targets, torch.zeros(100, dtype=torch.long), PREFERENCES)
    assert found.measures == {} and found.temperatures[1] > 1.3


def test_too_few_rows_to_try_a_temperature_are_not_measured() -> None:
    logits, targets, questions = overconfident(40, 2.0)  # enough to fit on all of them, not on half
    found = calibrate(logits, targets, questions, PREFERENCES)
    assert found.measures == {} and 1 not in found.temperatures


def test_a_temperature_at_its_bound_is_said() -> None:
    logits, targets, questions = overconfident(400, 1.0)
    with pytest.warns(UserWarning, match="temperature of two is at its bound"):
        logits[:, 0, :2] = targets[:, 0, :2]  # right about every row
        found = calibrate(logits, targets, questions, PREFERENCES)
    assert found.temperatures[0] < 0.101 and 0.5 < found.temperatures[1] < 2


def test_a_classifier_without_any_label_keeps_its_temperatures() -> None:
    with pytest.warns(UserWarning, match="two, four"):
        found = calibrate(torch.zeros(0, 2, 4), torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.long), PREFERENCES)
    assert found.temperatures == [1.0, 1.0] and found.measures == {}


def test_ece_of_a_perfect_forecaster_is_small_and_of_a_boaster_is_not() -> None:
    generator = torch.Generator().manual_seed(2)
    confidence = 0.5 + 0.5 * torch.rand(5000, generator=generator)
    outcome = (torch.rand(5000, generator=generator) < confidence).float()
    assert reliability(confidence, outcome).error < 0.03
    assert reliability(torch.full((5000,), 0.99), outcome).error.item() == pytest.approx(0.24, abs=0.02)
    assert math.isclose(reliability(confidence, outcome).share.sum().item(), 1.0, rel_tol=1e-5)
