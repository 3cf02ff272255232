import pytest
import torch

from moslim.mapping import Constrained, ExpectedDistance, TargetProbability, UserWeights
from moslim.plugin import all_parts
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1])
PREFERENCES = PreferenceSet({"two": ["a", "b"], "five": ["a", "b", "c", "d", "e"]})
PROBS = torch.tensor(
    [
        [[0.25, 0.75, 0, 0, 0], [0.5, 0, 0, 0, 0.5]],
        [[1.0, 0.0, 0, 0, 0], [0, 0, 1.0, 0, 0]],
        [[0.5, 0.5, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]],
    ]
)
TARGETS = torch.tensor([[1, 2], [-1, 4], [0, -1]])
# probability of level 3 or above of "five": .5 0 .4, on average .3


def bound(objective: object = None, **options: object) -> Constrained:
    defaults = {"hold": "five", "at_least": 3, "share": 0.5, "rate": 2.0}
    mapping = Constrained(objective or ExpectedDistance(), **{**defaults, **options})  # type: ignore[arg-type]
    mapping.bind(PREFERENCES)
    return mapping


def test_without_a_multiplier_it_is_the_objective() -> None:
    reward = bound()(PROBS, TARGETS, GROUPS)
    # requests for the held dimension are the constraint's, not the objective's
    expected = torch.tensor([[-0.25, 0.0], [NAN, NAN], [-0.5, -0.1]])  # the second is neutral: nothing rewards it
    torch.testing.assert_close(reward.per_dimension, expected, equal_nan=True)
    torch.testing.assert_close(reward.total[[0, 2]], torch.tensor([-0.25, -0.5]))


def test_the_multiplier_rises_while_the_constraint_is_violated() -> None:
    mapping = bound()
    mapping.observe(PROBS, TARGETS)
    assert mapping.multiplier == pytest.approx(2 * (0.5 - 0.3))
    reward = mapping(PROBS, TARGETS, GROUPS).total
    # What the objective does not reward is neither good nor bad to it: its mean over the others, -0.375.
    expected = [-0.25 / 1.4, (-0.375 + 0.4 * -0.5) / 1.4, (-0.5 + 0.4 * -0.1) / 1.4]
    assert reward.tolist() == pytest.approx(expected)


def test_the_multiplier_falls_to_zero_and_stops_at_its_limit() -> None:
    mapping = bound(limit=0.5)
    for _ in range(3):
        mapping.observe(PROBS, TARGETS)
    assert mapping.multiplier == 0.5
    satisfied = torch.tensor([[[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]]])
    mapping.observe(satisfied, torch.tensor([[-1, -1]]))
    assert mapping.multiplier == 0.0


def test_scoring_does_not_move_the_multiplier_and_its_state_comes_back() -> None:
    mapping, again = bound(), bound()
    mapping.observe(PROBS, TARGETS)
    state = mapping.state_dict()
    mapping(PROBS, TARGETS, GROUPS)
    assert mapping.state_dict() == state == {"multiplier": pytest.approx(0.4)}
    again.load_state_dict(state)
    torch.testing.assert_close(again(PROBS, TARGETS, GROUPS).total, mapping(PROBS, TARGETS, GROUPS).total)


def test_maximise_one_dimension_under_a_constraint_on_another() -> None:
    mapping = bound(UserWeights(weights={"two": 1.0}))
    mapping.multiplier = 1.0
    reward = mapping(PROBS, torch.full((3, 2), -1), GROUPS)  # whatever the prompt asks for
    torch.testing.assert_close(reward.total, torch.tensor([(0.75 + 0.0) / 2, (0.0 - 0.5) / 2, (0.5 - 0.1) / 2]))


def test_its_objective_observes_other_dimensions_and_is_a_part_of_its_own() -> None:
    objective = TargetProbability(scope="running")
    mapping = bound(objective)
    mapping.observe(PROBS, TARGETS)
    assert objective.state_dict()["running"].keys() == {"two/a", "two/b"}
    assert all_parts([mapping]) == [mapping, objective] and objective.place == ".0"


def test_wrong_arguments_are_named() -> None:
    for level in (0, 5):
        with pytest.raises(ValueError, match=r"dimension 'five' can be held at 1\.\.4"):
            bound(at_least=level)
    with pytest.raises(UsageError, match="no dimension 'six'"):
        bound(hold="six")
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        bound(share=1.5)
