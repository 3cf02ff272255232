import json
import random
from collections import Counter
from itertools import product

import pytest

from moslim.data.prompt_batches import Combinations
from moslim.data.samplers import Reachable, Uniform
from moslim.data.sources.workbench import HELD_OUT_PAIRS, Workbench, adversarial_rows
from moslim.data.types import RowKind, Split
from moslim.preferences import Preference, PreferenceSet
from moslim.workbench.grammar import (
    CLOSING_SLOT,
    ENCOURAGEMENTS,
    FILLERS,
    FOLDS,
    LEVELS,
    QUESTIONS,
    TOPICS,
    ask,
    gold_levels,
    opening,
    sentences,
    topic_of,
    topics_in,
)

PREFERENCES = PreferenceSet(LEVELS)
ALL = [(kind, split) for kind in RowKind for split in Split]


def small(**options):
    return Workbench(**{"corpus_rows": 2000, "reward_rows": 600, "bare_rows": 400, "policy_rows": 1500, **options})


def rows(source, kind, split=Split.TRAIN, seed=0):
    return source.rows(kind, split, PREFERENCES, seed)


def named(examples):
    """All topics that a question or answer names; rows that only ask to say some words are left out."""
    texts = [f"{row.question} {row.answer}" for row in examples if not row.question.startswith("Say:")]
    return {topic for text in texts for topic in topics_in(text)}


@pytest.fixture
def samples(tmp_path):
    """Twenty answers of a starter."""
    path = tmp_path / "samples.jsonl"
    topics = Workbench().topics(held_out=False)
    records = [{"question": ask(topics[i], 0), "answer": f"Sample {i}.\u2028 Good luck."} for i in range(20)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


# --- held-out topics


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_quarter_or_more_of_forty_or_more_topics_is_held_out(fold):
    source = Workbench(fold=fold)
    held_out, others = source.topics(held_out=True), source.topics(held_out=False)
    assert len(TOPICS) >= 40 and len(held_out) >= len(TOPICS) / 4
    assert not set(held_out) & set(others) and {*held_out, *others} == set(TOPICS)
    for other in set(range(FOLDS)) - {fold}:
        assert not set(held_out) & set(Workbench(fold=other).topics(held_out=True))


@pytest.mark.parametrize("fold", range(FOLDS))
@pytest.mark.parametrize(("kind", "split"), ALL)
def test_held_out_topics_are_in_the_starter_s_text_and_in_tests_and_nowhere_else(kind, split, fold):
    source = small(fold=fold)
    found = named(rows(source, kind, split))
    held_out = set(source.topics(held_out=True))
    if (kind, split) == (RowKind.TEXTS, Split.TRAIN):
        assert found == set(TOPICS)
    elif kind is not RowKind.LABELLED and split is Split.TEST:
        assert found == held_out
    else:
        assert found and not found & held_out


def test_a_fold_that_does_not_exist_is_an_error():
    for fold in (-1, FOLDS):
        with pytest.raises(ValueError, match=rf"source.fold is {fold}: give 0 to {FOLDS - 1}"):
            Workbench(fold=fold)


# --- held-out combinations


def test_held_out_pairs_can_be_reached_and_concern_every_dimension():
    assert {name for pair in HELD_OUT_PAIRS for name, _ in pair} == set(LEVELS)
    source = Workbench()
    for pair in HELD_OUT_PAIRS:
        assert source.held_out(Preference(dict(pair))) and source.reachable(Preference(dict(pair)))
        assert all(not source.held_out(Preference({name: level})) for name, level in pair)


def test_a_combination_is_held_out_by_a_pair_inside_it():
    source = Workbench()
    assert source.held_out(Preference({"verbosity": 0, "formality": 2, "warmth": 4}))
    assert not source.held_out(Preference({"verbosity": 1, "formality": 2, "warmth": 4}))
    assert not source.held_out(Preference())


def test_every_level_is_asked_for_in_training_and_no_held_out_combination_ever():
    source, generator = Workbench(), random.Random(0)
    for sampler in (Reachable([0.1, 0.2, 0.3, 0.2, 0.2]), Uniform([0.1, 0.2, 0.3, 0.2, 0.2])):
        drawn = [sampler.draw(PREFERENCES, generator, source) for _ in range(4000)]
        assert not any(source.held_out(preference) for preference in drawn)
        assert {item for p in drawn for item in p.levels.items()} == {(n, i) for n in LEVELS for i in range(5)}
        reached = [source.reachable(preference) for preference in drawn]
        assert all(reached) == isinstance(sampler, Reachable)


def test_tests_ask_for_unseen_combinations_that_answers_can_have():
    source = Workbench()
    unseen = Combinations(40, unseen=True).preferences(PREFERENCES, source, 0)
    assert len(unseen) == 40
    assert all(source.held_out(p) and source.reachable(p) for p in unseen)


# --- texts


def test_texts_are_unlabelled_and_as_long_as_asked():
    assert len(rows(small(), RowKind.TEXTS)) == 2000
    for split in Split:
        assert all(not row.levels for row in rows(small(), RowKind.TEXTS, split))


def test_predict_asks_plain_questions_for_the_starter_s_own_answers():
    asked = rows(small(reward_rows=2000), RowKind.TEXTS, Split.PREDICT)
    assert len(asked) == 2000 and all(row.answer is None for row in asked)
    plain = {ask(topic, form) for topic in Workbench().topics(held_out=False) for form in range(len(QUESTIONS))}
    assert {row.question for row in asked} == plain


# --- prompts


def test_training_prompts_are_plain_questions():
    asked = rows(small(), RowKind.PROMPTS)
    plain = {ask(topic, form) for topic in Workbench().topics(held_out=False) for form in range(len(QUESTIONS))}
    assert len(asked) == 1500 and {row.question for row in asked} == plain
    assert all(row.answer is None and not row.levels for row in asked)


def test_the_test_asks_forty_different_questions_or_more_about_held_out_topics():
    source = Workbench()
    asked = [row.question for row in rows(source, RowKind.PROMPTS, Split.TEST)]
    assert len(set(asked)) == len(asked) >= 40
    topics = source.topics(held_out=True)
    assert Counter(map(topic_of, asked)) == {topic: len(asked) // len(topics) for topic in topics}
    assert asked == [row.question for row in rows(source, RowKind.PROMPTS, Split.TEST, seed=9)]


def test_validation_asks_about_training_topics_in_mixed_order():
    asked = [row.question for row in rows(Workbench(), RowKind.PROMPTS, Split.VALIDATION)]
    assert len(set(map(topic_of, asked[:8]))) >= 5
    assert set(map(topic_of, asked)) == set(Workbench().topics(held_out=False))


# --- labelled rows


def test_the_classifier_learns_from_written_and_corrupted_answers_labelled_by_the_gold_scorer():
    pairs = rows(small(), RowKind.LABELLED)
    lone, bare, written, corrupted = pairs[:400], pairs[400:800], pairs[800:1400], pairs[1400:]
    assert len(corrupted) == 1800
    assert all(gold_levels(row.question, row.answer) == dict(row.levels) for row in pairs[800:])
    assert all(row.subset is None for row in pairs)
    assert [row.stage for row in pairs] == [0] * 400 + [1] * 400 + [2] * 2400
    assert {len(sentences(row.answer)) for row in lone} == {1} and {row.levels["helpfulness"] for row in lone} == {0, 1}
    assert {len(sentences(row.answer)) for row in bare} == {1, 2, 3, 4}
    for row in pairs[:800]:  # the style of bare steps is always the same: it is not labelled
        gold = gold_levels(row.question, row.answer)
        assert (gold.pop("formality"), gold.pop("warmth")) == (0, 0) and gold == dict(row.levels)
    assert {row.answer[:3] for row in written} <= {"Hey", "Gre"}
    assert any(not row.answer for row in corrupted)
    for name in LEVELS:
        assert set(Counter(row.levels[name] for row in written)) == set(range(5))


def test_the_starter_s_samples_come_in_the_last_stage_and_a_fifth_of_them_is_kept_back(samples):
    source = small(samples=samples)
    sampled = [row for row in rows(source, RowKind.LABELLED) if row.answer.startswith("Sample")]
    assert {row.stage for row in sampled} == {2}
    training = [row.answer for row in sampled]
    kept = [row for row in rows(source, RowKind.LABELLED, Split.VALIDATION) if row.subset == "samples"]
    assert [row.answer[:10].split(".")[0] for row in kept] == ["Sample 0", "Sample 5", "Sample 10", "Sample 15"]
    assert len(training) == 16 and not set(training) & {row.answer for row in kept}
    assert dict(kept[0].levels) == {"verbosity": 0, "formality": 0, "warmth": 1, "helpfulness": 0}


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 1: not JSON"), ('{"question": "q"}', "line 1: no field 'answer'")]
)
def test_a_broken_line_of_samples_is_named(tmp_path, line, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        rows(small(samples=str(path)), RowKind.LABELLED, Split.TRAIN)


def test_an_answer_that_training_has_too_is_not_a_fresh_sample(tmp_path):
    path = tmp_path / "samples.jsonl"
    records = [{"question": "How do I grow the rose?", "answer": answer} for answer in "aabcdb"]  # 0 and 5 kept back
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    kept = rows(small(samples=str(path)), RowKind.LABELLED, Split.VALIDATION)
    assert [row.answer for row in kept if row.subset == "samples"] == []
    records[0]["answer"] = "new"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    kept = rows(small(samples=str(path)), RowKind.LABELLED, Split.VALIDATION)
    assert [row.answer for row in kept if row.subset == "samples"] == ["new"]


def test_a_policy_s_answers_are_labelled_and_keep_what_was_requested(samples, tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [
        {"question": "How do I grow the rose?", "requested": {"warmth": 4}, "answer": f"Good luck. {i}"}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    source = small(samples=[str(path), samples])
    trained = [row for row in rows(source, RowKind.LABELLED) if row.requested]
    kept = [row for row in rows(source, RowKind.LABELLED, Split.TEST) if row.subset == "samples"]
    assert [row.answer[-1] for row in trained] == list("1234678") and {row.stage for row in trained} == {2}
    assert [row.requested for row in kept] == [{"warmth": 4}] * 2 + [{}] * 4
    assert {row.levels["warmth"] for row in trained} == {1}


def test_what_a_policy_is_asked_to_answer_is_reachable_and_not_held_out():
    source = small()
    asked = rows(source, RowKind.PROMPTS, Split.PREDICT)
    preferences = [Preference(row.levels) for row in asked]
    assert len(asked) == source.reward_rows and {len(preference.levels) for preference in preferences} == set(range(5))
    assert all(source.reachable(preference) and not source.held_out(preference) for preference in preferences)
    assert asked == rows(small(), RowKind.PROMPTS, Split.PREDICT)


def test_missing_samples_are_an_error_that_names_the_file():
    with pytest.raises(ValueError, match=r"data.source.samples: no file nowhere.jsonl; `main.py predict`"):
        rows(small(samples="nowhere.jsonl"), RowKind.LABELLED)


# --- adversarial answers


@pytest.fixture(scope="module")
def stored():
    """The committed file as it is."""
    from moslim.workbench import grammar

    path = grammar.__file__.replace("grammar.py", "adversarial.jsonl")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_adversarial_file_has_all_kinds_about_all_topics_and_no_labels(stored):
    assert all(row.keys() == {"kind", "question", "answer"} for row in stored)
    kinds = Counter(row["kind"] for row in stored)
    assert set(kinds) == {"foreign facts", "repeats", "cut off", "salad"} and min(kinds.values()) >= 40
    assert {topic_of(row["question"]) for row in stored} == set(TOPICS)


OPENINGS = [opening(formal) for formal in product((False, True), repeat=3)]


def _words_of(sentence):
    (words,) = sentences(sentence)
    return words


def test_adversarial_answers_are_what_they_are_called(stored):
    steps = {sentences(step)[0]: topic for topic in TOPICS for step in topic.steps}
    frames = [_words_of(text) for text in (*OPENINGS, *CLOSING_SLOT)]
    vocabulary = {word for part in [*steps, *map(_words_of, (*FILLERS, *ENCOURAGEMENTS)), *frames] for word in part}
    for row in stored:
        found = sentences(row["answer"])
        if row["kind"] == "repeats":
            again = {words for words in found if found.count(words) > 1}
            assert again & {_words_of(text) for text in (*topic_of(row["question"]).steps, *FILLERS)}, row
        elif row["kind"] == "salad":
            assert vocabulary.issuperset(word for words in found for word in words), row
        elif row["kind"] == "cut off":
            whole = [*topic_of(row["question"]).steps, *FILLERS, *ENCOURAGEMENTS, *OPENINGS, *CLOSING_SLOT]
            last = row["answer"].split(". ")[-1]
            assert any(text.startswith(f"{last} ") for text in whole), row
            assert set(found[:-1]) <= set(map(_words_of, whole)), row
        elif row["kind"] == "foreign facts":
            ours = topic_of(row["question"])
            strange = [words for words in found if words in steps and steps[words].verb != ours.verb]
            strange += [topic for topic in topics_in(row["answer"]) if topic is not ours]
            assert strange, row


def test_adversarial_answers_are_labelled_at_load_by_the_gold_scorer(stored):
    loaded = adversarial_rows()
    assert [(row.question, row.answer) for row in loaded] == [(row["question"], row["answer"]) for row in stored]
    assert all(dict(row.levels) == gold_levels(row.question, row.answer) for row in loaded)
    assert {row.subset for row in loaded} == {"adversarial"}
    worthless = [row for row in loaded if row.levels["helpfulness"] == 0 and row.levels["verbosity"] >= 2]
    assert len(worthless) > 50


@pytest.mark.parametrize("fold", range(FOLDS))
def test_every_fold_validates_on_hundreds_of_adversarial_answers_of_every_kind(fold, stored):
    kind = {(row["question"], row["answer"]): row["kind"] for row in stored}
    used = rows(Workbench(fold=fold), RowKind.LABELLED, Split.VALIDATION)
    assert len(used) >= 200
    found = Counter(kind[row.question, row.answer] for row in used)
    assert len(found) == 4 and min(found.values()) >= 25
    assert found["foreign facts"] >= 60


# --- determinism


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "split"), ALL)
def test_rows_follow_from_the_seed(kind, split, samples):
    source = small(samples=samples)
    first = rows(source, kind, split, seed=1)
    assert first == rows(small(samples=samples), kind, split, seed=1)
    drawn = split is not Split.TEST if kind is RowKind.PROMPTS else kind is RowKind.TEXTS or split is Split.TRAIN
    assert (first != rows(source, kind, split, seed=2)) == drawn


def test_kinds_and_splits_draw_apart_from_each_other():
    source = small()
    heads = [[row.question for row in rows(source, kind, split)[:8]] for kind, split in ALL]
    apart = {tuple(head) for head in heads}
    assert len(apart) == len(ALL) - 2  # validation, test and predict of the labelled rows are the same file


@pytest.mark.slow
def test_the_world_as_shipped_is_of_a_size_that_is_generated_in_seconds():
    source = Workbench()
    sizes = {kind: len(rows(source, kind)) for kind in RowKind}
    assert sizes == {RowKind.TEXTS: 8000, RowKind.LABELLED: 35120, RowKind.PROMPTS: 16384}


# --- dimensions


def test_some_dimensions_of_the_world_are_enough():
    some = PreferenceSet({"warmth": LEVELS["warmth"], "verbosity": LEVELS["verbosity"]})
    assert len(small().rows(RowKind.PROMPTS, Split.TRAIN, some, 0)) == 1500


@pytest.mark.parametrize(
    ("dimensions", "said"),
    [
        ({"honesty": ["low", "high"]}, "'honesty' is unknown to the embedded world"),
        ({"warmth": ["low", "high"]}, "'warmth' has the levels .* in `preferences`, but"),
    ],
)
def test_dimensions_that_the_world_lacks_are_an_error(dimensions, said):
    with pytest.raises(ValueError, match=said):
        small().rows(RowKind.LABELLED, Split.TRAIN, PreferenceSet(dimensions), 0)
