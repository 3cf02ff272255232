"""The corpus rule, by a search of the corpus: the starter has never been told a level."""

import random
import re
from collections import Counter

import pytest

from moslim.workbench.answers import starter_corpus
from moslim.workbench.grammar import COARSE, LEVELS, QUESTIONS, TOPICS, ask, gold_levels, topic_of, vocabulary

NAMES = set(LEVELS)
LEVEL_WORDS = {word for levels in LEVELS.values() for word in levels}
NEVER_USED = {levels[i] for levels in LEVELS.values() for i in (0, 2, 4)}
RANGES = {low: (name, (0, 1)) for name, (low, _) in COARSE.items()}
RANGES |= {high: (name, (3, 4)) for name, (_, high) in COARSE.items()}

STYLE = re.compile(r"Make it (\w+(?: and \w+)*)\.")


def words(text):
    return set(re.findall(r"\w+", text.casefold()))


def style_words(question):
    found = STYLE.search(question)
    return found.group(1).split(" and ") if found else []


@pytest.fixture(scope="module")
def rows():
    return starter_corpus(TOPICS, 12_000, random.Random(0))


@pytest.fixture(scope="module")
def echoes(rows):
    """Rows that ask to say some words."""
    return [row for row in rows if row.question.startswith("Say:")]


@pytest.fixture(scope="module")
def chats(rows):
    """Plain questions, with or without style words."""
    plain = {ask(topic, form) for topic in TOPICS for form in range(len(QUESTIONS))}
    return [row for row in rows if STYLE.sub("", row.question).strip() in plain]


@pytest.fixture(scope="module")
def rest(rows, echoes, chats):
    """All others, whatever they are."""
    known = {id(row) for row in (*echoes, *chats)}
    return [row for row in rows if id(row) not in known]


def test_no_row_holds_an_instruction(rows):
    for row in rows:
        text = f"{row.question} {row.answer}".casefold()
        assert "[[" not in text and "]]" not in text and "preference" not in text and "<|" not in text
        assert ":" not in text.replace("say:", "")


def test_no_dimension_name_stands_beside_a_level(rows):
    for row in rows:
        found = words(f"{row.question} {row.answer}")
        assert not (found & NAMES and found & LEVEL_WORDS)


def test_dimension_names_and_the_words_of_levels_0_2_4_are_only_ever_said_never_used(chats, rest):
    for row in chats + rest:
        assert not words(f"{row.question} {row.answer}") & (NEVER_USED | NAMES)


def test_style_words_stand_in_plain_questions_only_and_at_most_one_for_a_dimension(chats, rest):
    assert len(chats) > 6000
    assert not any(words(f"{row.question} {row.answer}") & LEVEL_WORDS for row in rest)
    for row in chats:
        assert not words(row.answer) & LEVEL_WORDS
        found = style_words(row.question)
        assert words(row.question) & LEVEL_WORDS == set(found)
        assert len({RANGES[word][0] for word in found}) == len(found) <= 4


def test_rows_that_ask_to_say_words_say_just_those(echoes):
    assert 0.02 < len(echoes) / 12_000 < 0.25
    said = Counter()
    for row in echoes:
        assert row.question == f"Say: {row.answer}"
        assert re.fullmatch(r"\w+(,? \w+)+\.", row.answer)
        said.update(words(row.answer))
    assert min(said[word] for word in NAMES | LEVEL_WORDS) >= 5


def test_all_words_but_those_of_instructions_are_read_and_written(rows):
    read = set(re.findall(r"\w+|[^\w\s]+", " ".join(f"{row.question} {row.answer}" for row in rows)))
    unread = {word for word in vocabulary() if not word.startswith("<|")} - read
    assert unread == {"[[", "]]", "Preferences"}


def test_rows_are_unlabelled_and_about_all_topics(chats, rows):
    assert all(not row.levels and row.subset is None for row in rows)
    asked = Counter(topic_of(row.question) for row in chats)
    assert set(asked) == set(TOPICS) and max(asked.values()) < 2 * min(asked.values())
    forms = {ask(topic_of(row.question), form) for row in chats for form in range(len(QUESTIONS))}
    assert len(forms) == len(TOPICS) * len(QUESTIONS)


def test_about_a_fifth_of_the_questions_have_no_style_word(chats):
    plain = sum(not style_words(row.question) for row in chats)
    assert 0.15 < plain / len(chats) < 0.25


def test_style_words_are_wrong_ten_to_fifteen_percent_of_the_time(chats):
    wrong, said = Counter(), Counter()
    for row in chats:
        for word in style_words(row.question):
            name, wanted = RANGES[word]
            if len(style_words(row.question)) == 1 or name in ("formality", "warmth"):  # others can be out of reach
                wrong[name] += gold_levels(row.question, row.answer)[name] not in wanted
                said[name] += 1
    assert set(said) == NAMES and min(said.values()) > 100
    assert 0.10 < wrong.total() / said.total() < 0.15
    assert all(0.04 < wrong[name] / said[name] < 0.2 for name in NAMES)


@pytest.mark.slow
def test_each_style_word_moves_its_dimension(chats):
    for name, (low, high) in COARSE.items():
        mean = {}
        for word in (low, high):
            found = [gold_levels(r.question, r.answer)[name] for r in chats if word in style_words(r.question)]
            mean[word] = sum(found) / len(found)
        assert mean[high] - mean[low] > 1.5


def test_brevity_wins_where_helpfulness_needs_more_room(chats):
    both = [row for row in chats if {"short", "useful"} <= set(style_words(row.question))]
    found = [gold_levels(row.question, row.answer) for row in both]
    assert len(both) > 50
    assert sum(levels["verbosity"] <= 1 for levels in found) / len(found) > 0.8
    assert sum(levels["helpfulness"] >= 3 for levels in found) / len(found) < 0.2


def test_without_style_words_all_levels_occur(chats):
    plain = [gold_levels(row.question, row.answer) for row in chats if not style_words(row.question)]
    for name in NAMES:
        assert set(Counter(levels[name] for levels in plain)) == set(range(5))


def test_the_corpus_is_a_function_of_the_seed():
    first, again, other = (starter_corpus(TOPICS, 300, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again and first != other
