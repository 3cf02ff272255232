"""What the rest of the project takes for granted about the world."""

import re
from pathlib import Path

import yaml

from moslim.workbench.grammar import (
    COARSE,
    ENCOURAGEMENTS,
    FILLERS,
    FOLDS,
    FORMAL_WORDS,
    LEVELS,
    QUESTIONS,
    STYLE_REQUEST,
    TOPICS,
    ask,
    topic_of,
    topics_in,
)

CONFIG = Path(__file__).parents[2] / "configs/preferences/workbench.yaml"


def words(*texts):
    return set(re.findall(r"\w+", " ".join(texts).casefold()))


def test_at_least_forty_topics_of_which_every_fold_holds_out_a_quarter():
    assert len(TOPICS) >= 40
    folds = [{topic for topic in TOPICS if topic.held_out_in == fold} for fold in range(FOLDS)]
    assert all(len(fold) >= len(TOPICS) / 4 for fold in folds)
    assert set.union(*folds) == set(TOPICS)
    assert sum(map(len, folds)) == len(TOPICS)


def test_every_fold_leaves_every_verb_to_training():
    verbs = {topic.verb for topic in TOPICS}
    for fold in range(FOLDS):
        assert {topic.verb for topic in TOPICS if topic.held_out_in == fold} == verbs
        assert {topic.verb for topic in TOPICS if topic.held_out_in != fold} == verbs


def test_a_topic_is_known_by_its_thing_alone():
    things = [topic.thing for topic in TOPICS]
    assert len(set(things)) == len(things)
    rest = words(*QUESTIONS, STYLE_REQUEST, *FILLERS, *ENCOURAGEMENTS, *(t.verb for t in TOPICS), *LEVELS)
    assert not set(things) & (rest | words(*(level for levels in LEVELS.values() for level in levels)))
    for topic in TOPICS:
        assert topics_in(" ".join(topic.steps)) == [topic]


def test_facts_are_enough_and_all_different():
    steps = {topic.verb: {step for t in TOPICS if t.verb == topic.verb for step in t.steps} for topic in TOPICS}
    assert all(len(set(topic.steps)) >= 5 for topic in TOPICS)
    assert len(set.union(*steps.values())) == sum(map(len, steps.values()))
    assert not set.union(*steps.values()) & {*FILLERS, *ENCOURAGEMENTS}


def test_sentences_are_short_enough_to_count_once():
    for sentence in [*(step for topic in TOPICS for step in topic.steps), *FILLERS, *ENCOURAGEMENTS]:
        found = re.findall(r"\w+", sentence)
        assert 2 <= len(found) <= 12 and max(map(len, found)) <= 16
        assert sentence[0].isupper() and sentence.endswith(".") and sentence.count(".") == 1


def test_steps_filler_and_warmth_hold_no_formal_word():
    assert not FORMAL_WORDS & words(*(s for topic in TOPICS for s in topic.steps), *FILLERS, *ENCOURAGEMENTS)
    assert len(FORMAL_WORDS) == 4


def test_every_level_has_one_word_of_its_own():
    names = [level for levels in LEVELS.values() for level in levels]
    assert all(len(levels) == 5 for levels in LEVELS.values()) and len(LEVELS) >= 4
    assert len({*names, *LEVELS}) == len(names) + len(LEVELS)
    assert all(re.fullmatch(r"[a-z]+", name) for name in [*names, *LEVELS])


def test_coarse_words_are_those_of_the_levels_one_and_three():
    assert {name: (levels[1], levels[3]) for name, levels in LEVELS.items()} == COARSE


def test_the_shipped_preferences_are_the_world_s():
    dimensions = yaml.safe_load(CONFIG.read_text())["dimensions"]
    assert dimensions == LEVELS and list(dimensions) == list(LEVELS)


def test_questions_name_their_topic_in_every_form():
    asked = [ask(topic, form) for topic in TOPICS for form in range(len(QUESTIONS))]
    assert len(set(asked)) == len(asked) >= 160
    assert [topic_of(question) for question in asked] == [t for t in TOPICS for _ in QUESTIONS]
    assert asked[0] == "How do I clean the goblet?"


def test_style_words_stand_after_the_question():
    assert ask(TOPICS[0], 0, ["short"]) == "How do I clean the goblet? Make it short."
    assert ask(TOPICS[0], 3, ["short", "friendly"]) == (
        "I want to clean the goblet. Any advice? Make it short and friendly."
    )


def test_topics_are_found_in_the_order_of_the_text():
    assert [t.thing for t in topics_in("A mirror, a KETTLE; the mirror's kettles.")] == ["mirror", "kettle", "mirror"]
    assert topics_in("nothing here") == []
