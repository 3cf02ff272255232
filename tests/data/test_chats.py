import pytest

from moslim.data.sources.conversations import Messages, Turns, split_turns


def test_turns_of_one_text():
    turns = Turns(user="\n<u>\n", assistant="\n<a>\n")
    assert turns.question("Why?\n<a>\nSo.\n<u>\nAnd: \n\n  how?\n") == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And: \n\n  how?"},
    ]
    assert turns.question(" Why <u>? ") == " Why <u>? "
    with pytest.raises(ValueError, match="not a text with turns"):
        turns.question(["Why?"])


def test_markers_are_no_patterns_and_need_no_text_before_them():
    assert split_turns("(u)Hi(a)", "(u)", "(a)") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
    ]


def test_messages_under_other_names():
    chat = Messages(content="text", roles={"prompter": "user"})
    turns = [{"role": "system", "text": "s", "id": 3}, {"role": "prompter", "text": "u"}]
    assert chat.question(turns) == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(ValueError, match=r"turn \{'text': 'u'\} lacks 'role' or 'text'"):
        chat.question([{"text": "u"}])
    with pytest.raises(ValueError, match="not a list of turns"):
        chat.question("u")
