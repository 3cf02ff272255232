import copy
import random
from collections import Counter

import pytest
import torch

from moslim.data.samplers import Curriculum, ErrorWeighted, Reachable, Uniform
from moslim.data.types import Source
from moslim.preferences import PreferenceSet

PREFERENCES = PreferenceSet({"a": ["0", "1"], "b": ["0", "1", "2"], "c": ["0", "1"]})


class Empty(Source):
    """Holds out a=1 with b=2; a=0 with b=0 cannot be reached."""

    def rows(self, kind, split, preferences, seed):
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


# --- error-weighted


def observed(sampler, *answers):
    """Lets a sampler see answers that surely have a level: (dimension, requested level, level)."""
    for name, target, level in answers:
        d = PREFERENCES.names.index(name)
        targets, probs = torch.full((1, 3), -1), torch.zeros(1, 3, 3)
        targets[0, d], probs[0, d, level] = target, 1.0
        sampler.observe(PREFERENCES, probs, targets)
    return sampler


def trained(**options):
    """Errors on a scale of 0 to 1: a 0 and 1, b 0.5, 0 and 0, c 0 and 0."""
    sampler = ErrorWeighted([0, 1], **options)
    answers = [("a", 0, 0), ("a", 1, 0), ("b", 0, 1), ("b", 1, 1), ("b", 2, 2), ("c", 0, 0), ("c", 1, 1)]
    return observed(sampler, *answers)


def test_error_weighted_shares_by_hand():
    sampler = trained(uniform=0.4)
    sampler.start_epoch(0, PREFERENCES)
    # Mean errors of the dimensions: a 1/2, b (1/2 + 0 + 0) / 3 = 1/6, c 0, so three quarters and a quarter of 0.6.
    a, b, c = 0.4 / 3 + 0.6 * 0.75, 0.4 / 3 + 0.6 * 0.25, 0.4 / 3
    levels = {"a": (0.2, 0.8), "b": (0.4 / 3 + 0.6, 0.4 / 3, 0.4 / 3), "c": (0.5, 0.5)}
    expected = {
        f"sampler/{name}/{level}": share * part
        for name, share in (("a", a), ("b", b), ("c", c))
        for level, part in enumerate(levels[name])
    }
    assert sampler.metrics() == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(next(iter(p.levels.items())) for p in draws(sampler, 6000))
    for (name, level), count in counts.items():
        share = expected[f"sampler/{name}/{level}"]
        assert abs(count - 6000 * share) < 4 * (6000 * share * (1 - share)) ** 0.5


def test_error_weighted_draws_as_many_dimensions_as_it_is_told_and_only_what_is_allowed():
    sampler = trained()
    sampler.active = (0.1, 0.2, 0.3, 0.4)
    sampler.start_epoch(0, PREFERENCES)
    found = draws(sampler)
    counts = Counter(len(p.levels) for p in found)
    assert all(abs(counts[k] / 3000 - share) < 0.03 for k, share in enumerate(sampler.active))
    source = Empty()
    assert not any(source.held_out(p) or not source.reachable(p) for p in found)
    assert all(list(p.levels) == sorted(p.levels) for p in found)  # in the order of the dimensions


def test_what_was_never_asked_for_counts_as_the_worst():
    sampler = observed(ErrorWeighted(uniform=0.5), ("b", 0, 1), ("a", 0, 0))  # errors 0.5 and 0
    sampler.start_epoch(0, PREFERENCES)
    shares = sampler.metrics()
    assert shares["sampler/a/0"] < shares["sampler/a/1"]  # seen and right, against unseen
    assert shares["sampler/b/0"] == pytest.approx(shares["sampler/b/1"])
    fresh = ErrorWeighted()
    fresh.start_epoch(0, PREFERENCES)
    even = {"a": 1 / 6, "b": 1 / 9, "c": 1 / 6}
    assert fresh.metrics() == pytest.approx({key: even[key.split("/")[1]] for key in fresh.metrics()})


def test_shares_change_at_the_start_of_an_epoch_only():
    sampler = trained()
    sampler.start_epoch(3, PREFERENCES)
    before = sampler.metrics()
    observed(sampler, *[("c", 0, 1)] * 20)
    assert sampler.metrics() == before
    resumed = ErrorWeighted([0, 1])
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for each in (sampler, resumed):
        each.start_epoch(3, PREFERENCES)  # the same epoch, as after a resumed run's start
        assert each.metrics() == before
        each.start_epoch(4, PREFERENCES)
    assert sampler.metrics() == resumed.metrics() != before
    assert sampler.metrics()["sampler/c/0"] > before["sampler/c/0"]
    assert draws(sampler, 50) == draws(resumed, 50)


def test_state_belongs_to_names():
    sampler = trained(uniform=0.4)
    sampler.start_epoch(3, PREFERENCES)
    fewer = ErrorWeighted([0, 1], uniform=0.4)
    fewer.load_state_dict(sampler.state_dict())
    two = PreferenceSet({"b": ["0", "1", "2"], "a": ["0", "1"]})
    fewer.start_epoch(4, two)
    assert fewer.metrics()["sampler/a/1"] == pytest.approx((0.2 + 0.6 * 0.75) * 0.8)
    more = PreferenceSet({"new": ["0", "1"], **PREFERENCES.to_dict()})
    fewer.start_epoch(4, more)  # resumed in the middle of an epoch that knew nothing of it
    assert fewer.metrics()["sampler/new/0"] > 0


@pytest.mark.parametrize(("option", "message"), [({"uniform": 0}, "sampler.uniform"), ({"decay": 1}, "decay")])
def test_error_weighted_options(option, message):
    with pytest.raises(ValueError, match=message):
        ErrorWeighted(**option)


# --- curriculum


def test_a_curriculum_names_one_dimension_more_every_so_many_epochs():
    sampler = Curriculum([0.2, 0.4, 0.2, 0.2], every=2)
    expected = {0: [0.2, 0.8], 1: [0.2, 0.8], 2: [0.2, 0.8 * 2 / 3, 0.8 / 3], 4: [0.2, 0.4, 0.2, 0.2]}
    expected[99] = expected[4]
    for epoch, shares in expected.items():
        sampler.start_epoch(epoch, PREFERENCES)
        assert sampler.metrics() == {"sampler/dimensions": len(shares) - 1}
        counts = Counter(len(p.levels) for p in draws(sampler, 2000))
        assert counts.keys() == set(range(len(shares)))
        assert all(abs(counts[k] / 2000 - share) < 0.04 for k, share in enumerate(shares))


def test_a_curriculum_s_epoch_is_all_it_depends_on():
    one, other = Curriculum(start=1), Curriculum(start=1)
    for epoch in (0, 1, 2):
        one.start_epoch(epoch, PREFERENCES)
    other.start_epoch(2, PREFERENCES)
    assert draws(one, 50) == draws(other, 50) and one.state_dict() == {}


def test_a_curriculum_that_allows_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"sampler\.active is 0 for 1 to 1 dimensions"):
        draws(Curriculum([0.5, 0, 0.5]), 1)
    assert {len(p.levels) for p in draws(Curriculum([1.0]), 5)} == {0}
    with pytest.raises(ValueError, match=r"sampler\.every"):
        Curriculum(every=0)
