"""The gold scorer on answers written by hand. Levels are given as ``v f w h``, dimension by dimension."""

import pytest

from moslim.workbench.grammar import gold_levels, sentences

KETTLE = "How do I clean the kettle?"
STEPS = [
    "Rinse the kettle.",
    "Scrub it.",
    "Wipe it.",
    "Dry it.",
    "Polish it.",
]
FILLERS = [
    "Results vary.",
    "Homes differ.",
    "People manage.",
    "Patience helps.",
    "Habits form.",
]
CASUAL = "Hey pal, check this."


def levels(answer, question=KETTLE):
    found = gold_levels(question, answer)
    assert list(found) == ["verbosity", "formality", "warmth", "helpfulness"]
    return " ".join(map(str, found.values()))


def words(count):
    return " ".join(["blah"] * count)


@pytest.mark.parametrize(("count", "level"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4), (40, 4)])
def test_verbosity_counts_sentences(count, level):
    different = [f"It is number {i}." for i in range(count)]
    assert levels(" ".join(different)) == f"{level} 0 0 0"
    assert levels(" ".join([CASUAL, *different, "Cheers."])) == f"{level} 0 0 0"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(" ".join(FILLERS), "4 0 0 0", id="each filler is a sentence"),
        pytest.param("Results vary. Results vary.", "1 0 0 0", id="a repeat is a sentence"),
        pytest.param(f"{CASUAL} {CASUAL}", "0 0 0 0", id="a second opening counts as the first sentence"),
        pytest.param(f"{CASUAL} {CASUAL} {CASUAL} {FILLERS[0]}", "2 0 0 0", id="three openings"),
        pytest.param(f"{CASUAL} Greetings pal, check this. {FILLERS[0]}", "1 1 0 0", id="two different openings"),
        pytest.param(f"{FILLERS[0]} Cheers. Regards.", "1 1 0 0", id="two different closings"),
        pytest.param("Cheers. Cheers. Cheers. Cheers.", "2 0 0 0", id="four closings"),
        pytest.param(f"{FILLERS[0]} {CASUAL}", "0 0 0 0", id="an opening at the end is still free"),
        pytest.param(f"{FILLERS[0]} Good luck. Have fun. Stay brave. Keep smiling.", "0 0 4 0", id="warmth is free"),
        pytest.param(
            "Good luck. Good luck. Good luck. Good luck.", "2 0 1 0", id="the same encouragement is free once"
        ),
        pytest.param("Good luck. Have fun. Good luck. Have fun.", "1 0 2 0", id="two encouragements twice"),
        pytest.param("Hey pal, check that. One. Two.", "2 0 0 0", id="an opening with another word is a sentence"),
        pytest.param("One\nTwo!\nThree? ... !? Four", "3 0 0 0", id="all ends of sentences"),
        pytest.param("Eins\u3002Zwei\uff01Drei\uff1f", "2 0 0 0", id="full-width ends of sentences"),
    ],
)
def test_what_counts_as_a_sentence(answer, expected):
    assert levels(answer) == expected


@pytest.mark.parametrize(
    ("count", "level"), [(1, 0), (12, 0), (13, 1), (24, 1), (25, 2), (36, 2), (37, 3), (48, 3), (49, 4), (500, 4)]
)
def test_run_on_text_counts_once_for_every_twelve_words(count, level):
    assert levels(words(count)) == f"{level} 0 0 0"
    assert levels(f"{CASUAL} {words(count)}") == f"{level} 0 0 0"


def test_words_without_spaces_are_not_short():
    assert levels("a" * 16 * 12) == "0 0 0 0"
    assert levels("a" * (16 * 12 + 1)) == "1 0 0 0"
    assert levels("字" * 2000) == "4 0 0 0"
    assert levels("internationalization is easy") == "0 0 0 0"


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("Hey pal, check this. Cheers.", 0),
        ("Greetings pal, check this. Cheers.", 1),
        ("Hey reader, check this. Cheers.", 1),
        ("Hey pal, observe this. Cheers.", 1),
        ("Hey pal, check this. Regards.", 1),
        ("Greetings reader, check this. Cheers.", 2),
        ("Hey pal, observe this. Regards.", 2),
        ("Greetings pal, observe this. Regards.", 3),
        ("Greetings reader, observe this. Cheers.", 3),
        ("Greetings reader, observe this. Regards.", 4),
        ("REGARDS greetings Observe reader", 4),
        ("Regards. Regards. Regards.", 1),
        ("Observe how a reader reads.", 2),
        ("Readers observed it regardless; she disregards greeting.", 0),
        ("", 0),
    ],
)
def test_formality_counts_different_formal_words(answer, level):
    assert gold_levels(KETTLE, answer)["formality"] == level


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("Have fun.", 1),
        ("Keep smiling. Good luck.", 2),
        ("Stay brave. Have fun. Good luck.", 3),
        ("Stay brave. Have fun. Good luck. Keep smiling.", 4),
        ("GOOD LUCK! have   fun\nStay\tbrave?", 3),
        ("Good luck. Good luck. Good luck.", 1),
        ("Good luck with it.", 0),
        ("Good luck and have fun.", 0),
        ("Luck good.", 0),
        ("Goodluck.", 0),
        ("I love you, dear friend! What a wonderful question!", 0),
    ],
)
def test_warmth_counts_different_encouragements(answer, level):
    assert gold_levels(KETTLE, answer)["warmth"] == level


@pytest.mark.parametrize("count", range(6))
def test_helpfulness_counts_different_right_steps(count):
    for chosen in (STEPS[:count], STEPS[5 - count :], STEPS[:count][::-1]):
        assert gold_levels(KETTLE, " ".join(chosen))["helpfulness"] == min(count, 4)


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        pytest.param("Rinse the kettle. Rinse the kettle. Scrub it. Scrub it.", 2, id="a repeat adds nothing"),
        pytest.param("Reward the kettle. Call it.", 0, id="other verb, same thing"),
        pytest.param("Plant the basil. Water it.", 0, id="another topic"),
        pytest.param("Scrub the kettle.", 0, id="a step in other words"),
        pytest.param("Rinse it.", 0, id="the first step without its thing"),
        pytest.param("Rinse the", 0, id="cut off"),
        pytest.param("Rinse the kettle and Scrub it.", 0, id="joined by and"),
        pytest.param("Rinse the kettle Scrub it", 0, id="no full stop between"),
        pytest.param("Never rinse the kettle.", 0, id="turned into its opposite"),
        pytest.param("the kettle Rinse.", 0, id="words out of order"),
        pytest.param("rinse  THE Kettle\t!SCRUB, it", 2, id="case, spacing, punctuation"),
        pytest.param("Rinse the\nkettle.", 0, id="a line end ends a sentence"),
        pytest.param("Scrub it. Wipe it.", 2, id="it is what the question names"),
        pytest.param("Rinse the skillet. Scrub it. Wipe it.", 0, id="it is what was named last"),
        pytest.param("Rinse the skillet. Scrub it. Rinse the kettle. Wipe it.", 2, id="back at our thing"),
        pytest.param("Scrub it. Rinse the skillet. Wipe it. Dry it.", 1, id="away from our thing"),
        pytest.param("Plant the basil. Scrub it.", 0, id="another topic's thing"),
        pytest.param("Mind the mirror and the kettle. Scrub it.", 1, id="the last of two"),
    ],
)
def test_helpfulness_takes_whole_right_sentences_about_our_thing_only(answer, level):
    assert gold_levels(KETTLE, answer)["helpfulness"] == level


def test_a_whole_answer():
    answer = "Greetings pal, observe this. Rinse the kettle. Results vary. Good luck. Cheers."
    assert levels(answer) == "1 2 1 1"
    assert levels(answer, "How do I train the puppy?") == "1 2 1 0"


@pytest.mark.parametrize(
    "question",
    [
        "What is the best way to clean the kettle? Make it short and friendly.",
        "kettle",
        "THE KETTLE!!",
        [{"role": "user", "content": KETTLE}],
        [{"role": "system", "content": "You know the mirror."}, {"role": "user", "content": KETTLE}],
        [
            {"role": "user", "content": "How do I clean the mirror?"},
            {"role": "assistant", "content": "Rinse the mirror."},
            {"role": "user", "content": "And the kettle?"},
        ],
        "Is the kettle better than the mirror?",
    ],
)
def test_the_topic_is_the_first_that_the_last_user_turn_names(question):
    assert levels("Rinse the kettle.", question) == "0 0 0 1"
    assert levels("Rinse the mirror.", question) == "0 0 0 0"


@pytest.mark.parametrize(
    "question",
    ["", "What is the capital of France?", "How do I clean kettles?", [], [{"role": "system", "content": ""}]],
)
def test_a_question_without_a_topic_has_no_right_steps(question):
    assert levels(" ".join(STEPS), question) == "4 0 0 0"


@pytest.mark.parametrize(
    ("answer", "verbosity"),
    [
        ("", 0),
        ("   \n\t ", 0),
        ("...!?!?\n\n", 0),
        ("Paris is the capital of France.", 0),
        ("Sure! First boil some water. Then add the tea leaves, wait for five minutes and pour it into a cup.", 3),
        ("It was the best of times; it was the worst of times. We had nothing. We had everything. Truly.", 3),
        ("<|end|> [[verbosity: short]] {question} %s \\x00 \x00", 0),
        ("Ὦ ξεῖν, ἀγγέλλειν Λακεδαιμονίοις. İstanbul ẞ ﬁne.", 1),
        ("🙂🙃 👍🏽. 🏳️‍🌈", 0),
        ("e\u0301cole \u202eabc\u202c \ud7ff. \uffff", 0),
    ],
)
def test_free_text_has_a_length_and_nothing_else(answer, verbosity):
    assert levels(answer) == f"{verbosity} 0 0 0"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("word " * 20_000, "4 0 0 0"),
        ("a" * 100_000, "4 0 0 0"),
        ("." * 100_000, "0 0 0 0"),
        ("Good luck. " * 9_100, "4 0 1 0"),
        ("Rinse the kettle. " * 5_600, "4 0 0 1"),
        ("Greetings reader, observe this. " * 3_100, "4 3 0 0"),
        ("\u0130" * 100_000, "4 0 0 0"),
    ],
)
def test_a_hundred_thousand_characters(answer, expected):
    assert len(answer) > 99_000
    assert levels(answer) == expected


def test_sentences_are_casefolded_words():
    assert sentences("Hey pal, CHECK this.. Straße!\n\nIt's") == [
        ("hey", "pal", "check", "this"),
        ("strasse",),
        ("it", "s"),
    ]
