import pytest

from moslim.instructions import PreferenceInstruction, SystemMessage, Tags, Template, instruction_forms, level_words
from moslim.preferences import Preference, PreferenceSet

PREFERENCES = PreferenceSet({"verbosity": ["short", "long"], "warmth": ["cold", "mild", "warm"]})
BOTH = Preference({"warmth": 2, "verbosity": 0})
CHAT = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "reply"},
    {"role": "user", "content": "last"},
]


def test_system_message_is_put_first():
    assert SystemMessage().render(CHAT, BOTH, PREFERENCES) == [
        {"role": "system", "content": "[[Preferences]] verbosity: short, warmth: warm"},
        *CHAT,
    ]


def test_an_existing_system_message_is_kept():
    chat = [{"role": "system", "content": "Be kind."}, *CHAT]
    rendered = SystemMessage().render(chat, Preference({"warmth": 0}), PREFERENCES)
    assert rendered == [{"role": "system", "content": "Be kind.\n\n[[Preferences]] warmth: cold"}, *CHAT]
    assert chat[0]["content"] == "Be kind."


def test_tags_stand_before_the_last_user_turn_in_the_order_of_the_set():
    rendered = Tags().render(CHAT, BOTH, PREFERENCES)
    assert rendered[:2] == CHAT[:2]
    assert rendered[2] == {"role": "user", "content": "[[verbosity: short]] [[warmth: warm]] last"}
    assert Tags(names=False).render(CHAT, BOTH, PREFERENCES)[2]["content"] == "[[short]] [[warm]] last"


def test_tags_without_names_need_different_level_names():
    same = PreferenceSet({"size": ["low", "high"], "heat": ["low", "hot"]})
    with pytest.raises(ValueError, match="'size' and 'heat' both have a level 'low'"):
        Tags(names=False).render(CHAT, Preference({"size": 0}), same)
    assert Tags().render(CHAT, Preference({"size": 0}), same)[2]["content"] == "[[size: low]] last"


def test_template_fills_both_placeholders_with_text_taken_as_it_is():
    chat = [{"role": "user", "content": "what is {preferences} {0}?"}]
    rendered = Template("{{style}} {preferences}! {question}").render(chat, BOTH, PREFERENCES)
    assert rendered == [
        {"role": "user", "content": "{style} verbosity: short, warmth: warm! what is {preferences} {0}?"}
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{question}",
        "{preferences}",
        "{question} {preferences} {question}",
        "{question} {preferences} {name}",
        "{question.__class__} {preferences}",
        "{question[0]} {preferences}",
        "{question!r} {preferences}",
        "{question:>20} {preferences}",
        "{} {preferences}",
        "{question} {preferences",
        "{question} {preferences} }",
    ],
)
def test_template_refuses_anything_else(text):
    with pytest.raises(ValueError, match="instruction template"):
        Template(text)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (Tags(names=False), {f"[[{level}]]": level for level in ("short", "long", "cold", "mild", "warm")}),
        (SystemMessage(), {"[[Preferences]]": "Preferences"}),
        (Template("{{Style}} {preferences}! {question}"), {"{Style} warmth: warm": "warmth: warm"}),
        (Template("{question} = {preferences}"), {"= warmth: warm": "warmth: warm"}),
        (Template("{preferences} => {question}"), {"warmth: warm =>": "warmth: warm"}),
        (Template("{preferences} {question}"), {"warmth: warm": ""}),
        (Tags(), {"[[warmth: warm]]": "warmth: warm", "[[warmth: warm": "warmth: warm"}),
    ],
)
def test_what_reads_as_a_shipped_instruction(instruction, expected):
    assert instruction_forms(instruction, PREFERENCES).items() >= expected.items()


def test_what_an_instruction_writes_for_a_level_reads_as_one_whoever_wrote_the_class():
    class Own(PreferenceInstruction):
        def render(self, messages, preference, preferences):
            words = ", ".join(f"{name} {level}" for name, level in level_words(preference, preferences))
            return [{"role": "system", "content": "Be good."}, *messages[:-1], {
                "role": "user", "content": f"{messages[-1]['content']}\nWanted: {words}"
            }]  # fmt: skip

    assert instruction_forms(Own(), PREFERENCES) == {
        f"Wanted: {dimension.name} {level}": "" for dimension in PREFERENCES.dimensions for level in dimension.levels
    }
    shared = PreferenceSet({"size": ["low", "high"], "heat": ["low", "hot"]})
    assert instruction_forms(Tags(names=False), shared)["[[low]]"] == "low"


def test_template_reserves_what_it_is_told_to():
    assert Template("{preferences} => {question}", reserved=["=>"]).reserved == ("=>",)


@pytest.mark.parametrize(
    "instruction", [SystemMessage(), Tags(), Tags(names=False), Template("{preferences}{question}")]
)
def test_an_empty_preference_leaves_the_chat_alone(instruction):
    assert instruction.render(CHAT, Preference(), PREFERENCES) == CHAT


@pytest.mark.parametrize("instruction", [SystemMessage(), Tags(), Template("{preferences}{question}")])
def test_levels_that_do_not_exist_are_refused(instruction):
    with pytest.raises(ValueError, match="level 2 of dimension 'verbosity'"):
        instruction.render(CHAT, Preference({"verbosity": 2}), PREFERENCES)
