import json
from pathlib import Path

import pytest
import torch

from moslim.mapping import FittedWeights, UserWeights
from moslim.preferences import PreferenceSet

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
# expected levels on a scale of 0 to 1: two = .75 0 .5, five = .5 .5 .5
TASTE = FittedWeights({"two": 2.0, "five": -1.0}, {"two": 0.5, "five": 0.7}, PREFERENCES.to_dict(), 40, 0.1, 0.9)


def bound(mapping: UserWeights, preferences: PreferenceSet = PREFERENCES) -> UserWeights:
    mapping.bind(preferences)
    return mapping


def test_the_utility_is_the_same_whatever_the_prompt_asks_for() -> None:
    mapping = bound(UserWeights(weights={"two": 2.0, "five": -1.0}))
    for targets in (torch.full((3, 2), -1), torch.tensor([[0, 4], [1, -1], [-1, 2]])):
        reward = mapping(PROBS, targets, GROUPS)
        torch.testing.assert_close(reward.per_dimension, torch.tensor([[1.5, -0.5], [0.0, -0.5], [1.0, -0.5]]))
        torch.testing.assert_close(reward.total, torch.tensor([1.0, -0.5, 0.5]))


def test_a_dimension_without_a_weight_does_not_count() -> None:
    reward = bound(UserWeights(weights={"five": 4.0}))(PROBS, torch.zeros(3, 2, dtype=torch.long), GROUPS)
    torch.testing.assert_close(reward.per_dimension[:, 0], torch.full((3,), NAN), equal_nan=True)
    torch.testing.assert_close(reward.total, torch.full((3,), 2.0))


def test_a_file_is_matched_by_name(tmp_path: Path) -> None:
    TASTE.save(tmp_path / "mine" / "user_weights.json")
    assert FittedWeights.load(tmp_path / "mine" / "user_weights.json") == TASTE
    mapping = UserWeights(path=str(tmp_path / "mine" / "user_weights.json"))
    turned = PreferenceSet({name: PREFERENCES.to_dict()[name] for name in ("five", "two")})
    bound(mapping, turned)
    reward = mapping(PROBS.flip(1), torch.full((3, 2), -1), GROUPS)
    torch.testing.assert_close(reward.total, torch.tensor([1.0, -0.5, 0.5]))


def test_a_taste_for_other_dimensions_or_levels_is_refused(tmp_path: Path) -> None:
    TASTE.save(tmp_path / "user_weights.json")
    mapping = UserWeights(path=str(tmp_path / "user_weights.json"))
    with pytest.raises(ValueError, match=r"a user weight for 'five', but `preferences` names only: two"):
        mapping.bind(PreferenceSet({"two": ["a", "b"]}))
    with pytest.raises(ValueError, match="fitted with the levels a, b; now they are b, a"):
        mapping.bind(PreferenceSet({"two": ["b", "a"], "five": ["a", "b", "c", "d", "e"]}))


def test_what_is_no_taste_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ValueError, match=r"other\.json holds no user weights .*python -m moslim.mapping.weighted"):
        UserWeights(path=str(tmp_path / "other.json"))
    for arguments in ({}, {"path": "a", "weights": {"two": 1.0}}):
        with pytest.raises(ValueError, match="give one of them"):
            UserWeights(**arguments)
