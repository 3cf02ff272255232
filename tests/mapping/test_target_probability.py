import io
import math

import pytest
import torch
from torch import Tensor

from moslim.mapping import TargetProbability
from moslim.preferences import PreferenceSet

NAN = float("nan")
PREFERENCES = PreferenceSet({"two": ["a", "b"], "three": ["a", "b", "c"]})
PROBS = torch.tensor(
    [
        [[0.9, 0.1, 0], [0.2, 0.3, 0.5]],
        [[0.5, 0.5, 0], [0.6, 0.3, 0.1]],
        [[0.3, 0.7, 0], [0.1, 0.1, 0.8]],
        [[0.2, 0.8, 0], [0.4, 0.4, 0.2]],
    ]
)
TARGETS = torch.tensor([[0, 2], [0, 2], [1, -1], [1, 2]])
GROUPS = torch.tensor([7, 7, 3, 3])
# probability of the requested level: two = .9 .5 .7 .8, three = .5 .1 nan .2


def bound(**options: object) -> TargetProbability:
    mapping = TargetProbability(**options)
    mapping.bind(PREFERENCES)
    return mapping


def rewards(mapping: TargetProbability) -> Tensor:
    return mapping(PROBS, TARGETS, GROUPS).per_dimension


def test_class_scope() -> None:
    # two levels: mean 1/2, std |p - 1/2|, so +1 or -1 whatever the confidence, except at the floor (row 1: 0 / floor)
    def three(p: float, others: tuple[float, float]) -> float:
        variance = sum((q - 1 / 3) ** 2 for q in (p, *others)) / 3
        return (p - 1 / 3) / math.sqrt(variance)

    expected = [
        [1.0, three(0.5, (0.2, 0.3))],
        [0.0, three(0.1, (0.6, 0.3))],
        [1.0, NAN],
        [1.0, three(0.2, (0.4, 0.4))],
    ]
    torch.testing.assert_close(rewards(bound(scope="class")), torch.tensor(expected), equal_nan=True)


def test_batch_scope() -> None:
    # two: mean .725, variance (.175^2 + .225^2 + .025^2 + .075^2) / 4; three, over its three active rows: mean .8/3
    two = math.sqrt((0.175**2 + 0.225**2 + 0.025**2 + 0.075**2) / 4)
    mean = 0.8 / 3
    three = math.sqrt(((0.5 - mean) ** 2 + (0.1 - mean) ** 2 + (0.2 - mean) ** 2) / 3)
    expected = [
        [0.175 / two, (0.5 - mean) / three],
        [-0.225 / two, (0.1 - mean) / three],
        [-0.025 / two, NAN],
        [0.075 / two, (0.2 - mean) / three],
    ]
    torch.testing.assert_close(rewards(bound(scope="batch")), torch.tensor(expected), equal_nan=True)


def test_group_scope() -> None:
    # pairs: +1 and -1, unless the spread is under the floor; a dimension asked of one answer only has no spread
    expected = [[1.0, 1.0], [-1.0, -1.0], [-0.5, NAN], [0.5, 0.0]]
    torch.testing.assert_close(rewards(bound(scope="group", std_floor=0.1)), torch.tensor(expected), equal_nan=True)


def test_running_scope() -> None:
    mapping = bound(scope="running", min_count=2)
    mapping.observe(PROBS, TARGETS)
    # per level: two/0 saw .9 .5, two/1 saw .7 .8, three/2 saw .5 .1 .2
    mean, three = 0.8 / 3, math.sqrt(((0.5 - 0.8 / 3) ** 2 + (0.1 - 0.8 / 3) ** 2 + (0.2 - 0.8 / 3) ** 2) / 3)
    expected = [
        [1.0, (0.5 - mean) / three],
        [-1.0, (0.1 - mean) / three],
        [-1.0, NAN],
        [1.0, (0.2 - mean) / three],
    ]
    torch.testing.assert_close(rewards(mapping), torch.tensor(expected), equal_nan=True)


def test_running_scope_uses_the_batch_until_a_level_was_seen_often_enough() -> None:
    mapping = bound(scope="running", min_count=3)
    mapping.observe(PROBS, TARGETS)
    batch, running = rewards(bound(scope="batch")), rewards(mapping)
    torch.testing.assert_close(running[:, 0], batch[:, 0])  # two answers per level of "two"
    mapping.observe(PROBS, TARGETS)
    assert not torch.allclose(rewards(mapping)[:, 0], batch[:, 0])


def test_running_statistics_average_at_first_and_forget_later() -> None:
    mapping = bound(scope="running", decay=0.9)

    def see(*values: float) -> list[float]:
        probs = torch.tensor([[[v, 1 - v, 0.0], [0.0, 0.0, 1.0]] for v in values], dtype=torch.float64)
        mapping.observe(probs, torch.tensor([[0, -1]] * len(values)))
        (found,) = mapping.state_dict()["running"].items()
        assert found[0] == "two/a"
        return found[1]

    assert see(0.2, 0.4) == pytest.approx([2, 0.3, 0.01])
    assert see(0.6, 0.8) == pytest.approx([4, 0.5, 0.05])  # plain mean and variance of all four
    for _ in range(20):
        see(0.1, 0.1)
    count, mean, variance = see(0.1, 0.1)
    assert count == 46
    assert mean == pytest.approx(0.1, abs=0.02) and variance == pytest.approx(0, abs=0.01)


def test_scoring_does_not_change_statistics() -> None:
    mapping = bound(scope="running")
    mapping.observe(PROBS, TARGETS)
    before = mapping.state_dict()
    rewards(mapping)
    assert mapping.state_dict() == before


def test_clip() -> None:
    assert rewards(bound(scope="batch", reward_clip=0.5)).nan_to_num().abs().max() == 0.5


def test_floor_must_be_positive() -> None:
    with pytest.raises(ValueError, match="std_floor"):
        TargetProbability(std_floor=0.0)


@pytest.mark.parametrize("scope", ["class", "batch", "group", "running"])
def test_order_of_the_batch_does_not_matter(scope: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    plain, shuffled = bound(scope=scope, min_count=2), bound(scope=scope, min_count=2)
    plain.observe(PROBS, TARGETS)
    shuffled.observe(PROBS[order], TARGETS[order])
    reward = shuffled(PROBS[order], TARGETS[order], GROUPS[order])
    torch.testing.assert_close(reward.per_dimension, rewards(plain)[order], equal_nan=True)


def test_total_is_the_mean_over_active_dimensions_and_zero_without_any() -> None:
    targets = TARGETS.clone()
    targets[3] = -1
    reward = bound(scope="group")(PROBS, targets, GROUPS)
    assert reward.total[0] == reward.per_dimension[0].mean()
    assert reward.total[2] == reward.per_dimension[2, 0]
    assert reward.total[3] == 0 and reward.per_dimension[3].isnan().all()


def test_state_survives_a_checkpoint() -> None:
    mapping = bound(scope="running", min_count=1)
    mapping.observe(PROBS, TARGETS)
    file = io.BytesIO()
    torch.save({mapping.state_key: mapping.state_dict()}, file)
    file.seek(0)
    again = bound(scope="running", min_count=1)
    again.load_state_dict(torch.load(file, weights_only=True)[again.state_key])
    assert again.state_dict() == mapping.state_dict()
    torch.testing.assert_close(rewards(again), rewards(mapping), equal_nan=True)
    again.observe(PROBS, TARGETS)
    assert again.state_dict() != mapping.state_dict()


def test_statistics_belong_to_names_whatever_the_order_and_number_of_dimensions() -> None:
    seen = bound(scope="running", min_count=2)
    seen.observe(PROBS, TARGETS)
    expected = rewards(seen)

    turned = TargetProbability(scope="running", min_count=2)
    turned.bind(PreferenceSet({"three": ["a", "b", "c"], "two": ["a", "b"]}))
    turned.load_state_dict(seen.state_dict())
    found = turned(PROBS.flip(1), TARGETS.flip(1), GROUPS).per_dimension
    torch.testing.assert_close(found, expected.flip(1), equal_nan=True)

    fewer = TargetProbability(scope="running", min_count=2)
    fewer.bind(PreferenceSet({"three": ["a", "b", "c"]}))
    fewer.load_state_dict(seen.state_dict())
    found = fewer(PROBS[:, 1:], TARGETS[:, 1:], GROUPS).per_dimension
    torch.testing.assert_close(found, expected[:, 1:], equal_nan=True)


def test_a_level_of_another_name_starts_anew() -> None:
    seen, renamed = bound(scope="running", min_count=2), TargetProbability(scope="running", min_count=2)
    seen.observe(PROBS, TARGETS)
    renamed.bind(PreferenceSet({"two": ["b", "a"], "three": ["x", "y", "z"]}))
    renamed.load_state_dict(seen.state_dict())
    found = renamed(PROBS, TARGETS, GROUPS).per_dimension
    batch = rewards(bound(scope="batch"))
    torch.testing.assert_close(found[:, 1], batch[:, 1], equal_nan=True)
    assert not torch.allclose(found[:, 0], batch[:, 0])  # "a" is the upper level now, and is taken at its word


def test_names_are_needed_for_running_statistics() -> None:
    with pytest.raises(RuntimeError, match="TargetProbability does not know its dimensions: call bind"):
        TargetProbability().observe(PROBS, TARGETS)


def test_state_key_tells_classes_apart() -> None:
    class Mine(TargetProbability):
        pass

    assert TargetProbability().state_key == "mapping:TargetProbability"
    assert Mine().state_key != TargetProbability().state_key
