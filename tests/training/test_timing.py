import time

import torch

from moslim.training.base_module import Stopwatch


def test_laps_add_up_by_name():
    before = time.perf_counter()
    clock = Stopwatch()
    for name, seconds in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        time.sleep(seconds)
        clock.lap(name)
    assert clock.durations.keys() == {"a", "b"}
    assert clock.durations["a"] >= 0.04 and clock.durations["b"] >= 0.01
    assert sum(clock.durations.values()) <= time.perf_counter() - before


def test_a_lap_begins_where_the_last_one_ended():
    clock = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    between = time.perf_counter()
    clock.lap("first")
    clock.lap("second")
    assert clock.durations["first"] >= 0.02
    assert 0 <= clock.durations["second"] <= time.perf_counter() - between


def test_reading_ends_no_lap():
    clock = Stopwatch()
    time.sleep(0.01)
    first = clock.read()
    clock.lap("all")
    assert 0.01 <= first <= clock.durations["all"] and clock.durations.keys() == {"all"}
