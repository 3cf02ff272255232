import random
from collections import Counter

import pytest

from moslim.data.sources.base import Source
from moslim.preferences import PreferenceSet
from moslim.sampling import Reachable, Uniform

PREFERENCES = PreferenceSet({"a": ["0", "1"], "b": ["0", "1", "2"], "c": ["0", "1"]})


class Empty(Source):
    """Holds out a=1 with b=2; a=0 with b=0 cannot be reached."""

    def rows(self, view, split, preferences, seed):
        return []

    def held_out(self, preference):
        return preference.levels.get("a") == 1 and preference.levels.get("b") == 2

    def reachable(self, preference):
        return not (preference.levels.get("a") == 0 and preference.levels.get("b") == 0)


def draws(sampler, count=3000):
    generator = random.Random(0)
    return [sampler.draw(PREFERENCES, generator, Empty()) for _ in range(count)]


def test_shares_of_the_number_of_dimensions():
    counts = Counter(len(p.levels) for p in draws(Uniform([0.2, 0.5, 0.3, 0.0])))
    assert counts[3] == 0
    assert abs(counts[0] / 3000 - 0.2) < 0.03
    assert abs(counts[1] / 3000 - 0.5) < 0.03


def test_default_shares():
    counts = Counter(len(p.levels) for p in draws(Uniform()))
    for k, share in enumerate([0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3]):
        assert abs(counts[k] / 3000 - share) < 0.03


def test_dimensions_and_levels_are_uniform():
    single = Counter(next(iter(p.levels.items())) for p in draws(Uniform([0, 1]), 6000))
    expected = {
        ("a", 0): 1000,
        ("a", 1): 1000,
        ("b", 0): 667,
        ("b", 1): 667,
        ("b", 2): 667,
        ("c", 0): 1000,
        ("c", 1): 1000,
    }
    assert single.keys() == expected.keys()
    assert all(abs(single[key] - expected[key]) < 130 for key in expected)


def test_uniform_avoids_only_what_is_held_out_and_reachable_both():
    source = Empty()
    uniform, reachable = draws(Uniform([0, 0, 0, 1])), draws(Reachable([0, 0, 0, 1]))
    assert not any(source.held_out(p) for p in uniform + reachable)
    assert not all(source.reachable(p) for p in uniform)
    assert all(source.reachable(p) for p in reachable)
    assert len(set(reachable)) == 8  # of 12, two are held out and two cannot be reached


def test_the_generator_is_the_only_randomness():
    assert draws(Reachable(), 50) == draws(Reachable(), 50)


@pytest.mark.parametrize("active", [[], [0.5, 0.4], [1.5, -0.5]])
def test_probabilities_must_add_up(active):
    with pytest.raises(ValueError, match="add up to 1"):
        Uniform(active)


def test_more_dimensions_than_there_are():
    with pytest.raises(ValueError, match="only 3 dimensions"):
        draws(Uniform([0, 0, 0, 0.5, 0.5]), 1)


class Nothing(Empty):
    """Holds out every combination."""

    def held_out(self, preference):
        return len(preference.levels) > 1


def test_a_source_that_allows_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"Nothing calls all of them .* set sampler.active\[2\] to 0"):
        Uniform([0, 0, 1]).draw(PREFERENCES, random.Random(0), Nothing())
