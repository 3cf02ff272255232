import pytest

from moslim.data.prompt_batches import Combinations, EvaluationKind, Request, Sweep, check_names, requests
from moslim.preferences import Preference, PreferenceSet
from tests.helpers.chats import Rows


def test_sweep_is_every_level_of_every_dimension(preferences):
    asked = requests([Sweep()], preferences, Rows(), seed=0)
    assert [dict(r.preference.levels) for r in asked] == [
        {"size": 0},
        {"size": 1},
        {"size": 2},
        {"heat": 0},
        {"heat": 1},
    ]
    assert [name for r in asked for name in r.preference.levels] == ["size"] * 3 + ["heat"] * 2
    assert {r.kind for r in asked} == {"sweep"}


def test_seen_combinations_are_reachable_and_not_held_out(preferences):
    seen = requests([Combinations(10, unseen=False)], preferences, Rows(), seed=0)
    assert {r.preference for r in seen} == {
        Preference({"size": size, "heat": heat}) for size, heat in [(0, 1), (1, 0), (1, 1), (2, 0)]
    }
    assert {r.kind for r in seen} == {"seen"}


def test_unseen_combinations_are_held_out(preferences):
    unseen = requests([Combinations(2, unseen=True)], preferences, Rows(), seed=0)
    assert [(r.preference, r.kind) for r in unseen] == [(Preference({"size": 2, "heat": 1}), "unseen")]


def test_draws_depend_on_the_seed_alone(preferences):
    draws = [Combinations(2, unseen=False).preferences(preferences, Rows(), seed) for seed in range(8)]
    assert draws == [Combinations(2, unseen=False).preferences(preferences, Rows(), seed) for seed in range(8)]
    assert len({tuple(draw) for draw in draws}) > 3
    assert all(len(draw) == 2 for draw in draws)


def test_one_dimension_has_no_combinations():
    assert Combinations(2, unseen=False).preferences(PreferenceSet({"size": ["low", "high"]}), Rows(), 0) == []


class Tops(EvaluationKind):
    """Asks for the highest levels at once."""

    def __init__(self, name="tops"):
        self.name = name

    def preferences(self, preferences, source, seed):
        return [Preference({dimension.name: len(dimension.levels) - 1 for dimension in preferences.dimensions})]


def test_a_kind_of_one_s_own_is_asked_for_in_its_turn(preferences):
    asked = requests([Tops(), Sweep()], preferences, Rows(), seed=0)
    assert asked[0] == Request(Preference({"size": 2, "heat": 1}), "tops")
    assert [request.kind for request in asked[1:]] == ["sweep"] * 5


@pytest.mark.parametrize("name", ["sweep", "size", "total", "", None, "a/b"])
def test_a_name_that_stands_for_something_else_is_refused(preferences, name):
    with pytest.raises(ValueError, match=rf"evaluation_kinds: Tops has the name {name!r}"):
        check_names([Tops(name)], preferences)


def test_two_kinds_of_one_name_are_refused(preferences):
    check_names([Tops(), Tops("others")], preferences)
    with pytest.raises(ValueError, match="Tops has the name 'tops'"):
        check_names([Tops(), Tops()], preferences)
