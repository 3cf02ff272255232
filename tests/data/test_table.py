import gzip
import json

import pyarrow.parquet
import pytest

from moslim.data.sources.labels import Scale, is_missing
from moslim.data.sources.table import Table
from moslim.data.types import Example, RowKind, Split
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*training (labels|row)", "ignore:.*the answer is empty")
PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"], "heat": ["cold", "hot"]})
HELPSTEER = PreferenceSet(
    {name: list("01234") for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")}
)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def write(text, name="rows.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def rows(table, kind=RowKind.LABELLED, split=Split.TRAIN, preferences=PREFERENCES):
    return table.rows(kind, split, preferences, seed=0)


def test_csv_with_missing_labels_and_line_breaks(write):
    path = write('question,answer,size,heat\nwhy?,"because,\nso",2,\nhow?,,nan,1\n')
    assert rows(Table(path)) == [
        Example("why?", "because,\nso", {"size": 2}),
        Example("how?", "", {"heat": 1}),
    ]


def test_rows_know_their_group_where_they_are_measured(write):
    path = write("question,answer,size,heat,article\nq,a,1,0,x\nq,b,1,1,y\n")
    assert [row.group for row in rows(Table(path, group="article"))] == ["x", "y"]
    assert [row.group for row in rows(Table(path))] == [None, None]


def test_kept_columns_are_handed_on_by_path(write):
    lines = [{"question": "q", "answer": "a", "size": 1, "facts": {"year": 1912}}, {"question": "r", "answer": "b"}]
    path = write("\n".join(map(json.dumps, lines)), "rows.jsonl")
    found = rows(Table(path, keep=["facts.year", "size"]), RowKind.PROMPTS)
    assert [row.columns for row in found] == [{"facts.year": 1912, "size": 1}, {"facts.year": None, "size": None}]


def test_json_lines_with_messages_and_absent_labels(write):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [
        {"question": chat, "answer": "a", "size": 1, "lang": "en"},
        {"question": "q", "answer": "b", "heat": None, "lang": "de"},
    ]
    path = write("\n".join(map(json.dumps, lines)) + "\n\n", "rows.jsonl")
    assert rows(Table(path, subset="lang")) == [Example(chat, "a", {"size": 1}, "en"), Example("q", "b", {}, "de")]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "rows.parquet")
    chat = [{"role": "user", "content": "u"}]
    columns = {"question": [chat, chat], "answer": ["a", "b"], "size": [0, None], "heat": [1.0, float("nan")]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert rows(Table(path)) == [Example(chat, "a", {"size": 0, "heat": 1}), Example(chat, "b", {})]


def test_a_data_set_in_the_layout_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "sets").mkdir()
    for split in ("train", "validation"):
        text = json.dumps({"question": split, "answer": "a", "size": 1, "heat": 0})
        (tmp_path / "sets" / f"{split}.jsonl").write_text(text + "\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = Table(str(tmp_path / "sets"), validation="validation")
    assert rows(table) == [Example("train", "a", {"size": 1, "heat": 0})]
    assert rows(table, split=Split.VALIDATION)[0].question == "validation"


def test_a_configuration_of_a_data_set_in_the_layout_of_the_hub(tmp_path, monkeypatch):
    for name in ("ratings", "others"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        text = json.dumps({"question": name, "answer": "a", "size": 1, "heat": 0})
        (tmp_path / "sets" / name / "rows.jsonl").write_text(text + "\n")
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("others", "ratings")]
    (tmp_path / "sets" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("ratings", "others"):
        assert [row.question for row in rows(Table(str(tmp_path / "sets"), config_name=name))] == [name]


def test_helpsteer2(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    row = {
        "prompt": "p",
        "response": "r",
        "helpfulness": 3,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 0,
    }
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "response": "s", "verbosity": 4}) + "\n")
    table = Table(str(path), question="prompt", answer="response")
    first, second = rows(table, preferences=HELPSTEER)
    assert first.levels == {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 0}
    assert (second.answer, second.levels["verbosity"]) == ("s", 4)
    assert [row.question for row in rows(table, RowKind.PROMPTS, preferences=HELPSTEER)] == ["p"]


def test_columns_and_scales(write):
    path = write("question,answer,big,heat\na,b,5,0.2\na,b,3,0.5\na,b,4.0,0.9\n")
    table = Table(path, columns={"size": "big"}, scales={"size": Scale(offset=-3), "heat": Scale(bins=[0.5])})
    assert [row.levels for row in rows(table)] == [
        {"size": 2, "heat": 0},
        {"size": 0, "heat": 1},
        {"size": 1, "heat": 1},
    ]
    names = Table(write("question,answer,size,heat\na,b,big,\n"), scales={"size": Scale(values={"small": 0, "big": 2})})
    assert rows(names)[0].levels == {"size": 2}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "question,answer,size,heat\na,b,1,0\na,b,3,0\n",
            {},
            r"rows.csv, line 3, field 'size': .*'3' is level 3, outside 0..2",
        ),
        ("question,answer,size,heat\na,b,-1,0\n", {}, r"line 2, field 'size': value '-1' is level -1"),
        ("question,answer,size,heat\na,b,1.5,0\n", {}, r"line 2, field 'size': value '1.5' is not a whole number"),
        ("question,answer,size,heat\na,b,big,0\n", {}, r"line 2, field 'size': value 'big' is not a number"),
        ("question,answer,size,heat\na,b,inf,0\n", {}, r"line 2, field 'size': value 'inf' is not a number"),
        (
            "question,answer,size,heat\na,b,big,0\n",
            {"scales": {"size": Scale(values={"small": 0})}},
            r"line 2, field 'size': value 'big' is none of \['small'\]",
        ),
        ('question,answer,size,heat\n"a\nb",b,1,0\n ,b,1,0\n', {}, r"line 4, field 'question': the question is empty"),
        (
            "question,answer,size\na,b,1\n",
            {},
            r"line 2: no field 'heat'; there are: question, answer, size. .*`columns.heat`",
        ),
        ("prompt,answer,size,heat\na,b,1,0\n", {}, r"line 2: no field 'question'; .*`question` of the Table"),
        ("question,size,heat\na,1,0\n", {}, r"line 2: no field 'answer'"),
        ("question,answer,size,heat\na,b,1,0,9\n", {}, r"line 2: more fields than the 4 of the header"),
        ("question,answer,size,heat\na,b,1\n", {}, r"line 2: the row ends before field 'heat'"),
        ('question,answer,size,heat\na,b,1,0\na,"b" c,1,0\n', {}, r"line 3: .*expected after"),
        ("question,answer,size,heat\n", {}, r"rows.csv: the table has no rows"),
    ],
)
def test_errors_name_file_line_and_field(write, text, options, message):
    with pytest.raises(ValueError, match=message):
        rows(Table(write(text), **options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"', r"rows.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: '\[1\]' is no JSON object"),
        ('{"question": 3, "answer": "b"}', r"line 2, field 'question'"),
        (
            '{"question": [{"role": "assistant", "content": "x"}], "answer": "b"}',
            r"line 2, field 'question': .*user turn",
        ),
        ('{"question": ["x"], "answer": "b"}', r"line 2, field 'question'"),
        ('{"question": "a", "answer": null}', r"line 2, field 'answer': the answer is None, not a text"),
    ],
)
def test_errors_in_json_lines(write, line, message):
    good = '{"question": "a", "answer": "b", "size": 1, "heat": 1}'
    with pytest.raises(ValueError, match=message):
        rows(Table(write(f"{good}\n{line}\n", "rows.jsonl")))


def test_a_missing_file_and_an_unknown_dimension(write):
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere.csv'"):
        rows(Table("nowhere.csv"))
    path = write("question,answer,size,heat\na,b,1,0\n")
    with pytest.raises(UsageError, match=r"data\.source\.columns: no dimension 'weight'; there are: size, heat"):
        rows(Table(path, columns={"weight": "size"}))
    with pytest.raises(ValueError, match="'dev' is no table file"):
        rows(Table(path, validation="dev"), split=Split.VALIDATION)


def test_questions_are_held_out_whole(write):
    lines = [f"question {i % 100}{' ' if i < 100 else ''},answer {i},1,1" for i in range(300)]
    path = write("\n".join(["question,answer,size,heat", *lines]))
    table = Table(path, validation_share=0.2, test_share=0.1)
    parts = {split: rows(table, split=split) for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)}
    questions = {split: {row.question.strip() for row in part} for split, part in parts.items()}
    assert sum(map(len, parts.values())) == 300
    assert sum(map(len, questions.values())) == 100
    assert 10 <= len(questions[Split.VALIDATION]) <= 30
    assert 3 <= len(questions[Split.TEST]) <= 20
    assert rows(table, split=Split.PREDICT) == []
    with pytest.raises(ValueError, match="leave something to train on"):
        Table(path, validation_share=0.5, test_share=0.5)


def test_a_file_of_its_own_takes_the_place_of_a_share(write):
    own = write("question,answer,size,heat\nown,b,1,0\n", "own.csv")
    path = write("question,answer,size,heat\n" + "".join(f"q{i},b,1,0\n" for i in range(50)))
    table = Table(path, validation=own, validation_share=0.5)
    assert len(rows(table)) == 50
    assert [row.question for row in rows(table, split=Split.VALIDATION)] == ["own"]


def test_policy_rows_are_questions_and_predict_rows_are_kept(write):
    path = write("question,size\nQ,0\nq ,1\nr,2\n")
    table = Table(path, predict=path)
    assert [row.question for row in rows(table, RowKind.PROMPTS)] == ["Q", "r"]
    assert [row.levels for row in rows(table, RowKind.PROMPTS, Split.PREDICT)] == [
        {"size": 0},
        {"size": 1},
        {"size": 2},
    ]


def test_text_rows_need_no_labels(write):
    assert rows(Table(write("question,answer\na,b\n")), RowKind.TEXTS) == [Example("a", "b")]


def test_only_observed_combinations_are_reachable(write):
    path = write("question,answer,size,heat\na,b,1,0\na,c,2,\nd,e,0,1\n")
    table = Table(path, only_observed=True)
    rows(table, RowKind.PROMPTS)
    reachable = [Preference(p) for p in ({"size": 1, "heat": 0}, {"size": 1}, {"heat": 1}, {"size": 2}, {})]
    assert all(table.reachable(p) for p in reachable)
    assert not any(table.reachable(Preference(p)) for p in ({"size": 1, "heat": 1}, {"size": 2, "heat": 0}))
    assert Table(path).reachable(Preference({"size": 1, "heat": 1}))


def test_scale_refuses_contradictions():
    with pytest.raises(ValueError, match="at most one"):
        Scale(offset=1, bins=[0.5])
    with pytest.raises(ValueError, match="ascending"):
        Scale(bins=[0.5, 0.5])
    assert [Scale(bins=[0.3, 0.7]).level(v) for v in (0, 0.3, "0.69", 0.7, 5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("value", "missing"), [(None, True), (float("nan"), True), (" ", True), ("NaN", True), (0, False), ("0", False)]
)
def test_zero_is_a_label(value, missing):
    assert is_missing(value) is missing


# --- several raters


def test_lists_and_several_columns_are_votes(write):
    lines = [
        {"question": "q", "answer": "a", "size": [3, None, 1], "one": "no", "two": "yes", "three": "?"},
        {"question": "r", "answer": "b", "size": [2], "one": "", "two": "yes", "three": None},
        {"question": "s", "answer": "c", "size": [], "one": None, "two": None, "three": None},
    ]
    path = write("\n".join(map(json.dumps, lines)), "rows.jsonl")
    scales = {"size": Scale(offset=-1), "heat": Scale(values={"no": 0, "yes": 1}, missing=["?"])}
    assert rows(Table(path, columns={"heat": ["one", "two", "three"]}, scales=scales)) == [
        Example("q", "a", {"size": 1, "heat": 0}, votes={"size": (2, 0), "heat": (0, 1)}),
        Example("r", "b", {"size": 1, "heat": 1}),
        Example("s", "c", {}),
    ]


def test_a_share_of_yes_votes_becomes_votes(write):
    path = write("question,answer,size,heat,raters\na,b,1,0.667,3\na,b,1,1,2\na,b,1,,\na,b,1,0,0\n")
    votes = [row.votes for row in rows(Table(path, counts={"heat": "raters"}))]
    assert votes == [{"heat": (0, 1, 1)}, {"heat": (1, 1)}, {}, {}]
    wrong = write("question,answer,size,heat,raters\na,b,1,0.6,3\n")
    with pytest.raises(ValueError, match=r"line 2, field 'heat': '0.6' is no share of 3 votes"):
        rows(Table(wrong, counts={"heat": "raters"}))
    wrong = write("question,answer,size,heat,raters\na,b,1,half,3\n")
    with pytest.raises(ValueError, match=r"line 2, field 'heat': 'half' of '3' votes: give a share"):
        rows(Table(wrong, counts={"heat": "raters"}))
    with pytest.raises(ValueError, match=r"line 2: no field 'rater'.*`counts.heat`"):
        rows(Table(path, counts={"heat": "rater"}))
    with pytest.raises(ValueError, match=r"counts.size: votes of yes or no need two levels"):
        rows(Table(path, counts={"size": "raters"}))
    with pytest.raises(ValueError, match="either scales or counts"):
        Table(path, counts={"heat": "raters"}, scales={"heat": Scale()})


# --- comparisons


def test_a_rejected_answer_with_dimensions_and_margin(write):
    lines = [
        {"question": "q", "answer": "a", "worse": "b", "about": ["heat"], "by": [1, 2, None], "size": 2},
        {"question": "q", "answer": "a", "worse": None, "about": None, "by": None, "size": None},
        {"question": "q", "answer": "a", "worse": "", "about": [], "by": None, "size": None},
    ]
    path = write("\n".join(map(json.dumps, lines)), "rows.jsonl")
    table = Table(path, rejected="worse", comparison_dimensions="about", margin="by")
    assert rows(table) == [
        Example("q", "a", {"size": 2}, rejected="b", comparison_dimensions=("heat",), margin=1.5),
        Example("q", "a"),
        Example("q", "a", rejected=""),
    ]
    assert rows(Table(path, rejected="worse", comparison_dimensions=["size", "heat"]))[0].comparison_dimensions == (
        "size",
        "heat",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"worse": 3}, r"line 1, field 'worse': the answer is 3, not a text"),
        ({"about": ["weight"]}, r"line 1, field 'about': \['weight'\] is no list of dimensions; there are: size, heat"),
        ({"about": "heat"}, r"line 1, field 'about': 'heat' is no list"),
        ({"by": -1}, r"line 1, field 'by': value -1 prefers the rejected answer"),
        ({"by": "much"}, r"line 1, field 'by': value 'much' is not a number"),
    ],
)
def test_errors_in_comparisons(write, fields, message):
    row = {"question": "q", "answer": "a", "worse": "b", "about": ["heat"], "by": 1, **fields}
    table = Table(write(json.dumps(row), "rows.jsonl"), rejected="worse", comparison_dimensions="about", margin="by")
    with pytest.raises(ValueError, match=message):
        rows(table)


def test_comparisons_need_known_dimensions_and_an_answer_to_compare(write):
    path = write("question,answer,worse\nq,a,b\n")
    with pytest.raises(UsageError, match=r"data\.source\.comparison_dimensions: no dimension 'weight'"):
        rows(Table(path, rejected="worse", comparison_dimensions=["weight"]))
    with pytest.raises(ValueError, match=r"line 2: no field 'bad'.*`rejected`"):
        rows(Table(path, rejected="bad"))
    with pytest.raises(ValueError, match="name its column"):
        Table(path, comparison_dimensions=["heat"])
    with pytest.raises(ValueError, match=r"no field 'big'.*`columns.size`"):
        rows(Table(path, rejected="worse", columns={"size": "big"}))


# --- which rows, and on which side


def test_where_keeps_rows_and_constants_add_columns(write):
    path = write("lang,text,size,heat\nen,a,1,0\nde,b,1,0\nfr,c,2,1\n")
    table = Table(path, answer="text", where={"lang": ["en", "fr"]}, constants={"question": "Go on."})
    assert [(row.question, row.answer) for row in rows(table)] == [("Go on.", "a"), ("Go on.", "c")]
    with pytest.raises(ValueError, match=r"rows.csv: no row has the values in `where`: \{'lang': \['it'\]\}"):
        rows(Table(path, where={"lang": ["it"]}))
    with pytest.raises(ValueError, match=r"line 2: no field 'tongue'.*`where`"):
        rows(Table(path, where={"tongue": ["en"]}))


def chats(count, **first):
    """Three answers to each of many chats, which differ in white space or case."""
    lines = []
    for i in range(3 * count):
        number = i % count
        text = [f"Question {number}", f"question  {number}", f"\nQUESTION {number}"][i // count]
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        question = [*turns, {"role": "user", "content": text}]
        lines.append({"question": question, "answer": str(i), "size": i % 3, "heat": i % 2, **first})
    return "\n".join(map(json.dumps, lines))


def test_chats_are_held_out_whole(write):
    table = Table(write(chats(80), "rows.jsonl"), validation_share=0.3, test_share=0.2)
    numbers = {
        split: {row.question[-1]["content"].split()[-1] for row in rows(table, split=split)}
        for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)
    }
    counts = [len(rows(table, split=split)) for split in numbers]
    assert sum(counts) == 240 and counts == [3 * len(found) for found in numbers.values()]
    assert sum(map(len, numbers.values())) == 80 and min(map(len, numbers.values())) > 5
    assert len(rows(table, RowKind.PROMPTS)) == len(numbers[Split.TRAIN])


def test_a_group_stays_on_one_side(write):
    table = Table(write(chats(40), "rows.jsonl"), validation_share=0.5, group="question.0.content")
    with pytest.raises(UsageError, match=r"validation_share and test_share take all 120 rows of .*rows.jsonl: lower"):
        rows(table)


@pytest.fixture
def shared(write):
    """A training table and a test table, of whose four rows three ask what training asks."""
    own = write("question,answer,size,heat\nNEW,b,1,0\nold  one,b,1,0\nOld one,c,2,1\nsecond,d,0,1\n", "test.csv")
    path = write("question,answer,size,heat\nOld One,a,1,0\nsecond,a,0,1\nthird,a,2,1\n")
    return lambda policy: Table(path, test=own, shared_questions=policy)


def test_questions_on_both_sides_are_found(shared):
    said = (
        r"3 of 4 held-out rows ask 2 questions that training has, too, e.g. 'old one' \(.*test.csv, line 3; "
        r".*rows.csv, line 2\)"
    )
    with pytest.warns(UserWarning, match=f"{said}; they are kept"):
        assert len(rows(shared("warn"), split=Split.TEST)) == 4
    with pytest.warns(UserWarning, match=f"{said}; they are left out"):
        assert [row.question for row in rows(shared("drop"), split=Split.TEST)] == ["NEW"]
    with pytest.raises(ValueError, match=f"{said}; `shared_questions: drop`"):
        rows(shared("error"), split=Split.TEST)
    assert len(rows(shared("error"))) == 3


def test_a_chat_of_one_turn_is_the_same_question_as_its_text(write):
    chat = [{"role": "user", "content": "Why?"}]
    own = write(json.dumps({"question": chat, "answer": "b", "size": 0, "heat": 0}), "own.jsonl")
    path = write("question,answer,size,heat\nwhy?,a,1,0\n")
    with pytest.raises(ValueError, match="1 of 1 held-out rows ask 1 questions"):
        rows(Table(path, validation=own, shared_questions="error"), split=Split.VALIDATION)


# --- what is odd, but not wrong


def test_oddities_are_said_once_for_a_table(write):
    path = write("question,answer,worse,size,heat\na,,b,1,\nb,c,c,1,\nd, ,e,1,\n")
    with pytest.warns(UserWarning) as warned:
        found = rows(Table(path, rejected="worse", columns={"size": "size", "heat": "heat"}))
    assert [row.answer for row in found] == ["", "c", " "] and found[1].rejected is None
    said = [str(warning.message) for warning in warned]
    assert len(said) == 4
    assert "2 of 3 rows: the answer is empty (first: " in said[0] and "line 2)" in said[0]
    assert "1 of 3 rows: the rejected answer is the answer" in said[1]
    assert "rows.csv: all 3 training labels of dimension 'size' (field 'size') are level 1" in said[2]
    assert "rows.csv: no training row has a label for dimension 'heat' (field 'heat')" in said[3]


def test_a_label_that_is_not_a_number_is_missing_and_said(write):
    path = write("question,answer,size,heat\na,b,1,\nb,c,NaN,0\nc,d,nan,1\n")
    with pytest.warns(UserWarning, match=r"^2 of 3 rows: field 'size' is NaN, .*\(first: .*rows.csv, line 3\)$"):
        assert [row.levels for row in rows(Table(path))] == [{"size": 1}, {"heat": 0}, {"heat": 1}]
    path = write('{"question": "a", "answer": "b", "size": [1, NaN], "heat": null}', "rows.jsonl")
    with pytest.warns(UserWarning, match=r"^1 of 1 rows: field 'size' is NaN"):
        assert rows(Table(path)) == [Example("a", "b", {"size": 1})]


def test_nothing_is_said_of_good_rows(write, recwarn):
    path = write("question,answer,size,heat\na,b,1,0\nb,c,2,1\n")
    for kind in RowKind:
        for split in Split:
            rows(Table(path), kind, split)
    assert [str(warning.message) for warning in recwarn] == []


# --- what a policy was asked for


def test_requested_levels(write):
    path = write(
        '{"question": "a", "answer": "b", "requested": {"size": 2, "other": 7}}\n'
        '{"question": "c", "answer": "d", "requested": {"size": null, "heat": 0}}\n'
        '{"question": "e", "answer": "f", "requested": null, "size": 0, "heat": 1}\n',
        "answers.jsonl",
    )
    wanted = [{"size": 2}, {"heat": 0}, {}]
    assert [row.requested for row in rows(Table(path, requested="requested"))] == wanted
    scored = Table(predict=path, requested="requested").stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, seed=0)
    assert [row.requested for row in scored] == wanted
    assert [row.requested for row in rows(Table(path))] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ('{"size": 3}', r"line 1, field 'requested': value 3 is level 3, outside 0\.\.2 of dimension 'size'"),
        ('{"size": "big"}', r"line 1, field 'requested': value 'big' is not a number"),
        ("2", r"line 1, field 'requested': 2 is no object with the level of each dimension"),
    ],
)
def test_errors_in_requested_levels(requested, message, write):
    path = write(f'{{"question": "a", "answer": "b", "size": 0, "heat": 0, "requested": {requested}}}', "answers.jsonl")
    with pytest.raises(ValueError, match=message):
        rows(Table(path, requested="requested"))
    with pytest.raises(ValueError, match=r"line 1: no field 'asked'.*in `requested` of the Table"):
        rows(Table(path, requested="asked"))


# --- rows to score


def test_rows_to_score_are_read_one_by_one_without_labels(write):
    lines = ['{"key": 3, "text": "a", "answer": "b", "size": 99}', '{"text": "c", "answer": ""}', '{"text": "d"}']
    table = Table(
        predict=write("\n".join(lines), "rows.jsonl"),
        question="text",
        id="key",
        columns={"size": "elsewhere"},
        subset="x",
    )
    found = table.stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, seed=0)
    assert next(found) == Example("a", "b", id=3)
    assert next(found) == Example("c", "")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: no field 'answer'"):
        next(found)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_streamed_rows_are_those_that_are_read_at_once(name, write, tmp_path):
    records = [{"question": f"q{i}", "answer": "b", "lang": ["en", "fr"][i % 2], "id": f"n{i}"} for i in range(5)]
    if name == "rows.csv":
        path = write("question,answer,lang,id\n" + "".join(",".join(row.values()) + "\n" for row in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
        path = str(tmp_path / name)
    table = Table(predict=path, where={"lang": ["fr"]}, constants={"reply": "c"}, answer="reply")
    streamed = list(table.stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, seed=0))
    assert streamed == rows(table, RowKind.LABELLED, Split.PREDICT)
    assert [(row.question, row.answer, row.id) for row in streamed] == [("q1", "c", "n1"), ("q3", "c", "n3")]


def test_a_table_with_nothing_but_rows_to_score_cannot_be_trained_on(write):
    with pytest.raises(ValueError, match=r"data\.source\.path is not given"):
        rows(Table(predict=write("question,answer\na,b\n")))
