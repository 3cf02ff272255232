from moslim.data.requests import combination_requests, sweep_requests
from moslim.preferences import Preference, PreferenceSet
from tests.helpers.chats import Rows


def test_sweep_is_every_level_of_every_dimension(preferences):
    requests = sweep_requests(preferences)
    assert [dict(r.preference.levels) for r in requests] == [
        {"size": 0},
        {"size": 1},
        {"size": 2},
        {"heat": 0},
        {"heat": 1},
    ]
    assert [name for r in requests for name in r.preference.levels] == ["size"] * 3 + ["heat"] * 2
    assert {r.kind for r in requests} == {"sweep"}


def test_seen_combinations_are_reachable_and_not_held_out(preferences):
    seen = combination_requests(preferences, Rows(), 10, seed=0, unseen=False)
    assert {r.preference for r in seen} == {
        Preference({"size": size, "heat": heat}) for size, heat in [(0, 1), (1, 0), (1, 1), (2, 0)]
    }
    assert {r.kind for r in seen} == {"seen"}


def test_unseen_combinations_are_held_out(preferences):
    unseen = combination_requests(preferences, Rows(), 2, seed=0, unseen=True)
    assert [(r.preference, r.kind) for r in unseen] == [(Preference({"size": 2, "heat": 1}), "unseen")]


def test_draws_depend_on_the_seed_alone(preferences):
    draws = [combination_requests(preferences, Rows(), 2, seed, False) for seed in range(8)]
    assert draws == [combination_requests(preferences, Rows(), 2, seed, False) for seed in range(8)]
    assert len({tuple(r.preference for r in draw) for draw in draws}) > 3
    assert all(len(draw) == 2 for draw in draws)


def test_one_dimension_has_no_combinations():
    assert combination_requests(PreferenceSet({"size": ["low", "high"]}), Rows(), 2, 0, False) == []
