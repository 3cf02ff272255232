import pytest

from moslim.data.sources.layouts import Dialogues, Each, Escaped, Pattern, Replies, SideBySide, Verdict
from moslim.data.sources.records import Record


def record(**fields):
    return Record("rows.jsonl, line 7", fields)


def test_each_entry_of_a_list_is_a_row_of_its_own():
    rows = Each("answers").rows([record(q="why", answers=[{"a": 1}, {"a": 2}]), record(q="how", answers=[])])
    assert [row.fields for row in rows] == [{"q": "why", "answers": {"a": 1}}, {"q": "why", "answers": {"a": 2}}]
    assert rows[1].place == "rows.jsonl, line 7, answers.1"
    with pytest.raises(ValueError, match=r"line 7, field 'answers': None is not a list"):
        Each("answers").rows([record(answers=None)])
    with pytest.raises(ValueError, match=r"no field 'replies'.*`layout.column`"):
        Each("replies").rows([record(answers=[])])


def test_escapes_are_written_out():
    text = r"a \"real chance\" of \u00a31.3bn, \ud83d\ude00 a\nb, C:\Users, \\ and \u12"
    (row,) = Escaped(["summary"]).rows([record(summary=text, other=text)])
    assert row.fields["summary"] == 'a "real chance" of £1.3bn, 😀 a\nb, C:\\Users, \\ and \\u12'
    assert Escaped(["summary"]).rows([record(summary=r"cut \ud83d")])[0].fields["summary"] == "cut \ufffd"
    assert row.fields["other"] == text and row.place == "rows.jsonl, line 7"
    with pytest.raises(ValueError, match=r"line 7, field 'summary': None is not a text"):
        Escaped(["summary"]).rows([record(summary=None)])


def two(verdicts, **fields):
    layout = SideBySide({"answer": "a", "safe": "sa"}, {"answer": "b", "safe": "sb"}, verdicts)
    rows = layout.rows([record(a="A", b="B", sa=True, sb=False, **fields)])
    return [
        [row.fields[name] for name in ("answer", "safe", "rejected", "comparison_dimensions", "margin")] for row in rows
    ]


@pytest.mark.parametrize(
    ("value", "first", "second"),
    [
        (-2, ["A", True, "B", ["x"], 2.0], ["B", False, None, [], 0.0]),
        (1.5, ["A", True, None, [], 0.0], ["B", False, "A", ["x"], 1.5]),
        (0, ["A", True, None, [], 0.0], ["B", False, None, [], 0.0]),
        (None, ["A", True, None, [], 0.0], ["B", False, None, [], 0.0]),
        ([2, 1, None, 0], ["A", True, None, [], 0.0], ["B", False, "A", ["x"], 1.0]),  # the mean of those who said
        ([3, -3], ["A", True, None, [], 0.0], ["B", False, None, [], 0.0]),  # they cancel out
        ([], ["A", True, None, [], 0.0], ["B", False, None, [], 0.0]),
    ],
)
def test_a_verdict_says_which_answer_is_better_and_how_clearly(value, first, second):
    assert two([Verdict("v", ["x"], graded=True)], v=value) == [first, second]


def test_verdicts_on_several_dimensions():
    ids = [Verdict("better", ["x"], tie=0.5), Verdict("safer", ["y"], tie=0.5)]
    first, second = two(ids, better=0, safer=1)
    assert (first[3], second[3]) == (["x"], ["y"]) and first[4] == second[4] == 0.0
    assert two(ids, better=1, safer=1)[1][3] == ["x", "y"]
    assert two([ids[0], Verdict("all", graded=True)], better=1, all=2)[1][2:] == ["A", [], 2.0]  # empty = all


def test_an_answer_of_which_nothing_is_said_is_left_out():
    layout = SideBySide({"answer": "a"}, {"answer": "b"}, [Verdict("v")])
    assert [row.fields["answer"] for row in layout.rows([record(a="A", b="B", v=1), record(a="C", b="D", v=0)])] == [
        "B"
    ]


def test_two_answers_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"layout.second is .*must say which field is the `answer`"):
        SideBySide({"answer": "a"}, {"safe": "b"}, [])
    with pytest.raises(ValueError, match=r"line 7, field 'v': value 'left' is not a number"):
        two([Verdict("v")], v="left")
    with pytest.raises(ValueError, match=r"no field 'w'.*`layout.verdicts`"):
        two([Verdict("w")], v=1)


def test_a_dialogue_must_be_text():
    with pytest.raises(ValueError, match=r"line 7, field 'rejected': the dialogue is None, not a text"):
        Dialogues().rows([record(chosen="\n\nHuman: a\n\nAssistant: b", rejected=None)])


def test_replies_need_the_message_that_they_reply_to():
    fixed = {"labels": {"name": ["quality"], "value": [0.5], "count": [2]}}
    messages = [
        record(message_id="2", parent_id="1", role="assistant", text="b", **fixed),
        record(message_id="1", parent_id=None, role="prompter", text="a", **fixed),
        record(message_id="4", parent_id="3", role="assistant", text="c", **fixed),
    ]
    (reply,) = Replies().rows(messages)
    assert reply.fields["context"] == [{"role": "prompter", "text": "a"}] and reply.fields["response"] == "b"
    assert (reply.fields["ratings"], reply.fields["counts"]) == ({"quality": 0.5}, {"quality": 2})


def test_a_pattern_must_be_one_and_name_columns():
    with pytest.raises(ValueError, match="is no regular expression"):
        Pattern("prompt", "Q: (")
    with pytest.raises(ValueError, match="names no columns"):
        Pattern("prompt", "Q: (.*)")
    with pytest.raises(ValueError, match=r"line 3: no field 'prompt'.*`layout.field`"):
        Pattern("prompt", "Q: (?P<question>.*)").rows([Record("rows.jsonl, line 3", {"text": "Q: why?"})])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"labels": {"name": ["q"], "value": None, "count": [1]}},
            "field 'labels.value': None is no list with an entry",
        ),
        ({"labels": {"name": ["q"], "value": [1], "count": [1, 2]}}, r"field 'labels.count': \[1, 2\] is no list"),
        ({"labels": {"name": [["q"]], "value": [1], "count": [1]}}, "field 'labels.value': .* is no list"),
        ({"parent_id": "1"}, "field 'parent_id': message '1' replies to itself"),
        ({"message_id": "2", "parent_id": "1", "text": None}, None),
    ],
)
def test_replies_that_cannot_be_used_have_a_place(changed, message):
    good = {"name": ["q"], "value": [0.5], "count": [2]}
    fields = {"message_id": "1", "parent_id": None, "role": "assistant", "text": "t", "labels": good, **changed}
    if message is None:  # its parent is not in the table, so that it is left out
        assert Replies().rows([record(**fields)]) == []
        return
    with pytest.raises(ValueError, match=f"rows.jsonl, line 7, {message}"):
        Replies().rows([record(**fields)])
