import pytest
import torch

from moslim.mapping import ExpectedDistance, MappingFunction, TargetProbability, Tchebycheff, Weighted
from moslim.mapping.base import weighted_mean
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1])
PREFERENCES = PreferenceSet({"two": ["a", "b"], "five": ["a", "b", "c", "d", "e"]})
PROBS = torch.tensor([[[0.25, 0.75, 0, 0, 0], [0.5, 0, 0, 0, 0.5]]] * 3)
TARGETS = torch.tensor([[1, 0], [0, -1], [-1, -1]])


def bound(mapping: MappingFunction) -> MappingFunction:
    mapping.bind(PREFERENCES)
    return mapping


def test_the_mean_by_weights_of_names_and_levels() -> None:
    found = bound(Weighted(ExpectedDistance(), {"two": [5.0, 3.0]}))(PROBS, TARGETS, GROUPS)
    plain = bound(ExpectedDistance())(PROBS, TARGETS, GROUPS)
    torch.testing.assert_close(found.per_dimension, plain.per_dimension, equal_nan=True)
    # two is off by .25 of a level, five by 2; weights 3 (for level 1) and 1
    torch.testing.assert_close(found.total, torch.tensor([-(3 * 0.25 + 2.0) / 4, -0.75, 0.0]))
    torch.testing.assert_close(found.weights[:2], torch.tensor([[3.0, 1.0], [5.0, 1.0]]))


def test_equal_weights_change_nothing() -> None:
    rewards = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    rewards[::3, 1:4] = NAN
    rewards[5] = NAN
    assert torch.equal(weighted_mean(rewards, torch.ones_like(rewards)), rewards.nanmean(-1).nan_to_num(nan=0.0))
    torch.testing.assert_close(weighted_mean(rewards, torch.full_like(rewards, 0.1)), rewards.nanmean(-1).nan_to_num())


def test_weights_within_weights_multiply() -> None:
    inner = Weighted(ExpectedDistance(), {"two": 2.0})
    found = bound(Weighted(inner, {"two": 3.0, "five": [1.0, 1, 1, 1, 7]}))
    assert found.weights(torch.tensor([[1, 4], [0, 0]])).tolist() == [[6.0, 7.0], [6.0, 1.0]]


def test_statistics_of_the_objective_are_kept() -> None:
    mapping = bound(Weighted(TargetProbability(scope="running"), {"two": 2.0}))
    mapping.observe(PROBS, TARGETS)
    (objective,) = mapping.children
    alone = bound(TargetProbability(scope="running"))
    alone.observe(PROBS, TARGETS)
    assert objective.state_dict() == alone.state_dict() != bound(TargetProbability(scope="running")).state_dict()


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="Tchebycheff makes a scalar of its own"):
        Weighted(Tchebycheff(), {"two": 2.0})
    with pytest.raises(ValueError, match=r"the weight of 'two' is 0\.0: give a number above 0"):
        Weighted(ExpectedDistance(), {"two": 0.0})
    with pytest.raises(ValueError, match="'five' has 5 levels, but 2 weights"):
        bound(Weighted(ExpectedDistance(), {"five": [1.0, 2.0]}))
    with pytest.raises(UsageError, match="none"):
        bound(Weighted(ExpectedDistance(), {"none": 1.0}))


def test_a_dimension_without_weight_does_not_count() -> None:
    class Unweighted(ExpectedDistance):
        def weights(self, targets: torch.Tensor) -> torch.Tensor:
            return super().weights(targets) * torch.tensor([1.0, 0.0])

    mapping = Unweighted()
    mapping.bind(PreferenceSet({"a": ["x", "y"], "b": ["x", "y"]}))
    probs = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]] * 2)
    found = mapping(probs, torch.tensor([[0, 1], [-1, 1]]), torch.zeros(2))
    assert found.per_dimension.isnan().tolist() == [[False, True], [True, True]]
    assert found.total.tolist() == [-0.25, 0.0]
