import itertools
import random
from collections import Counter

import pytest

from moslim.workbench.grammar import (
    LEVELS,
    TOPICS,
    ask,
    build_tokenizer,
    draw_levels,
    gold_levels,
    opening,
    reachable,
    write_answer,
)

KETTLE = next(topic for topic in TOPICS if topic.thing == "kettle")
GRID = [dict(zip(LEVELS, point, strict=True)) for point in itertools.product(range(5), repeat=4)]


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.thing)
def test_an_answer_has_exactly_the_levels_asked_for(topic):
    rng = random.Random(0)
    question = ask(topic, 0)
    combinations = [levels for levels in GRID if reachable(levels)]
    assert len(combinations) == 475  # 19 of 25 pairs of verbosity and helpfulness, times 5 times 5
    first_of_its_verb = topic is next(other for other in TOPICS if other.verb == topic.verb)
    for levels in combinations if first_of_its_verb else combinations[::6]:
        assert gold_levels(question, write_answer(topic, levels, rng)) == levels


def test_what_is_unreachable_is_refused():
    refused = 0
    for levels in GRID:
        if levels["helpfulness"] > levels["verbosity"] + 1:
            assert not reachable(levels)
            with pytest.raises(ValueError, match=f"{levels['helpfulness']} facts need as many sentences"):
                write_answer(TOPICS[0], levels, random.Random(0))
            refused += 1
    assert refused == 150


def test_requests_for_some_dimensions_are_reachable_unless_brevity_forbids():
    assert reachable({}) and reachable({"helpfulness": 4}) and reachable({"verbosity": 0, "warmth": 4})
    assert reachable({"verbosity": 0, "helpfulness": 1}) and not reachable({"verbosity": 0, "helpfulness": 2})


def test_every_reachable_level_is_written_in_more_than_one_way():
    levels = {"verbosity": 4, "formality": 2, "warmth": 1, "helpfulness": 4}
    rng = random.Random(0)
    answers = {write_answer(KETTLE, levels, rng) for _ in range(200)}
    assert len(answers) == 12  # two of four places are formal; four facts or five
    assert all(gold_levels("the kettle", answer) == levels for answer in answers)


def test_an_answer_reads_in_order():
    rng = random.Random(0)
    levels = {"verbosity": 2, "formality": 4, "warmth": 2, "helpfulness": 2}
    assert write_answer(KETTLE, levels, rng) == (
        "Greetings reader, observe this. Rinse the kettle. Scrub it. Results vary. Good luck. Have fun. Regards."
    )
    assert opening((False, True, False)) == "Hey reader, check this."


def test_answers_fit_into_forty_tokens_with_their_end():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    longest = 0
    for topic in TOPICS:
        for levels in GRID[::29] + [{**GRID[-1], "formality": f} for f in range(5)]:
            if reachable(levels):
                answer = write_answer(topic, levels, rng)
                longest = max(longest, len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1)
    assert 30 < longest <= 40


def test_levels_are_drawn_uniformly_from_what_is_reachable():
    rng = random.Random(0)
    drawn = [draw_levels({}, rng) for _ in range(10_000)]
    assert all(map(reachable, drawn))
    for name in ("formality", "warmth"):
        assert all(abs(count / 10_000 - 1 / 5) < 0.02 for count in Counter(d[name] for d in drawn).values())
    pairs = Counter((d["verbosity"], d["helpfulness"]) for d in drawn)
    assert len(pairs) == 19
    assert all(abs(count / 10_000 - 1 / 19) < 0.01 for count in pairs.values())


def test_wanted_levels_are_kept():
    rng = random.Random(0)
    wanted = {"verbosity": (0, 1), "helpfulness": (2, 3, 4), "warmth": (3,)}
    drawn = [draw_levels(wanted, rng) for _ in range(200)]
    assert {(d["verbosity"], d["helpfulness"], d["warmth"]) for d in drawn} == {(1, 2, 3)}
    assert {d["formality"] for d in drawn} == set(range(5))


def test_what_cannot_be_wanted_is_refused():
    with pytest.raises(ValueError, match=r"no answer has verbosity in \(0,\) and helpfulness in \(3, 4\)"):
        draw_levels({"verbosity": (0,), "helpfulness": (3, 4)}, random.Random(0))
