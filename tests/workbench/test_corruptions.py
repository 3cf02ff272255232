import inspect
import random
import re
from collections import Counter

import pytest

from moslim.workbench import answers as corruptions
from moslim.workbench.answers import (
    WEIGHTS,
    bare_steps,
    corrupt,
    cut_off,
    empty,
    foreign_facts,
    lone_step,
    repeats,
    shuffled,
    word_salad,
)
from moslim.workbench.grammar import FILLERS, TOPICS, ask, gold_levels, topics_in

KETTLE = next(topic for topic in TOPICS if topic.thing == "kettle")
OTHERS = [topic for topic in TOPICS if topic is not KETTLE]
QUESTION = ask(KETTLE, 0)
EVERY_STEP = {step for topic in TOPICS for step in topic.steps}


def many(kind, count=300):
    rng = random.Random(0)
    return [kind(KETTLE, OTHERS, rng) for _ in range(count)]


def parts(answer):
    return [f"{part}." for part in answer.rstrip(".").split(". ")]


def test_foreign_facts_sound_right_and_are_not():
    answers = many(foreign_facts, 400)
    foreign = [sum(s in EVERY_STEP and s not in KETTLE.steps for s in parts(answer)) for answer in answers]
    assert sum(count > 0 for count in foreign) > 120 and max(foreign) >= 4
    worthless = [a for a, f in zip(answers, foreign, strict=True) if f and gold_levels(QUESTION, a)["helpfulness"] == 0]
    assert len(worthless) > 30
    same_verb = {topic.thing for topic in OTHERS if topic.verb == "clean"}
    named = Counter(topic.thing for answer in answers for topic in topics_in(answer) if topic is not KETTLE)
    assert set(named) > same_verb and sum(named[thing] for thing in same_verb) > 0.4 * named.total()


def test_a_lone_step_is_right_or_wrong_about_as_often():
    answers = many(lone_step, 400)
    assert all(len(parts(answer)) == 1 for answer in answers)
    right = [gold_levels(QUESTION, answer)["helpfulness"] for answer in answers]
    assert set(right) == {0, 1} and 120 < sum(right) < 280


def test_bare_steps_are_one_to_four_steps_and_nothing_else():
    answers = many(bare_steps, 400)
    assert {len(parts(answer)) for answer in answers} == {1, 2, 3, 4}
    assert all(set(parts(answer)) - EVERY_STEP <= strange(answer) for answer in answers)
    assert set(Counter(gold_levels(QUESTION, answer)["helpfulness"] for answer in answers)) == {0, 1, 2, 3, 4}


def strange(answer):
    """First steps of other verbs with the kettle in them."""
    return {part for part in parts(answer) if part.endswith("the kettle.")}


def test_repeats_repeat():
    for answer in many(repeats):
        assert max(Counter(parts(answer)).values()) >= 2
        assert len(set(parts(answer))) < len(parts(answer))


def test_shuffled_sentences_are_whole_and_out_of_order():
    answers = many(shuffled)
    known = EVERY_STEP | set(FILLERS)
    assert all(1 <= len(parts(answer)) <= 8 for answer in answers)
    steps = [[KETTLE.steps.index(s) for s in parts(answer) if s in KETTLE.steps] for answer in answers]
    assert sum(found != sorted(found) for found in steps) > 60
    assert sum(s in known for answer in answers for s in parts(answer)) > 600


def test_cut_off_stops_in_the_middle():
    answers = many(cut_off)
    assert all(answer and not answer.endswith(" ") for answer in answers)
    assert sum(not answer.endswith(".") for answer in answers) > 150
    assert len({len(answer.split()) for answer in answers}) > 15


def test_word_salad_has_the_words_but_not_the_sentences():
    answers = many(word_salad)
    broken = [a for a in answers if not set(parts(a)) <= EVERY_STEP | set(FILLERS)]
    assert len(broken) > 280
    formal = [re.match(r"(Greetings|reader|observe|Regards) (Greetings|reader|observe|Regards)\b", a) for a in answers]
    assert sum(bool(found) for found in formal) > 20


def test_empty_is_empty():
    assert many(empty, 3) == ["", "", ""]


@pytest.mark.parametrize("kind", [kind for kind, _ in WEIGHTS], ids=lambda kind: kind.__name__)
def test_foreign_material_comes_from_the_topics_given(kind):
    allowed = TOPICS[20:25]
    rng = random.Random(1)
    for _ in range(200):
        assert set(topics_in(kind(KETTLE, allowed, rng))) <= {KETTLE, *allowed}


def test_every_kind_of_the_file_is_drawn():
    functions = {f for f in vars(corruptions).values() if getattr(f, "__module__", "") == corruptions.__name__}
    arguments = inspect.signature(corrupt).parameters.keys()
    public = {f for f in functions if f.__name__[0] != "_" and inspect.signature(f).parameters.keys() == arguments}
    assert {kind for kind, _ in WEIGHTS} == public - {corrupt, lone_step, bare_steps}
    assert all(weight > 0 for _, weight in WEIGHTS)


def test_what_went_wrong_is_a_function_of_the_seed():
    first, again, other = ([corrupt(KETTLE, OTHERS, rng) for _ in range(50)] for rng in map(random.Random, (1, 1, 2)))
    assert first == again and first != other
    assert "" in [corrupt(KETTLE, OTHERS, random.Random(seed)) for seed in range(200)]


def test_corruptions_have_all_levels_of_helpfulness_so_that_none_gives_them_away():
    rng = random.Random(0)
    found = Counter(gold_levels(QUESTION, corrupt(KETTLE, OTHERS, rng))["helpfulness"] for _ in range(2000))
    assert set(found) == set(range(5)) and found[0] > found[4]
