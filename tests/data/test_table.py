import gzip
import json

import pyarrow.parquet
import pytest

from moslim.data.sources.scale import Scale, is_missing
from moslim.data.sources.table import Table
from moslim.data.types import Example, Split, View
from moslim.preferences import Preference, PreferenceSet

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


def rows(table, view=View.REWARD, split=Split.TRAIN, preferences=PREFERENCES):
    return table.rows(view, split, preferences, seed=0)


def test_csv_with_missing_labels_and_line_breaks(write):
    path = write('question,answer,size,heat\nwhy?,"because,\nso",2,\nhow?,,nan,1\n')
    assert rows(Table(path)) == [
        Example("why?", "because,\nso", {"size": 2}),
        Example("how?", "", {"heat": 1}),
    ]


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
    assert [row.question for row in rows(table, View.POLICY, preferences=HELPSTEER)] == ["p"]


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
        ("question,answer,size,heat\na,b,inf,0\n", {}, r"line 2, field 'size': value 'inf' is not a whole number"),
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
    with pytest.raises(KeyError, match="no dimension 'weight'"):
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
    assert [row.question for row in rows(table, View.POLICY)] == ["Q", "r"]
    assert [row.levels for row in rows(table, View.POLICY, Split.PREDICT)] == [{"size": 0}, {"size": 1}, {"size": 2}]


def test_text_rows_need_no_labels(write):
    assert rows(Table(write("question,answer\na,b\n")), View.TEXT) == [Example("a", "b")]


def test_only_observed_combinations_are_reachable(write):
    path = write("question,answer,size,heat\na,b,1,0\na,c,2,\nd,e,0,1\n")
    table = Table(path, only_observed=True)
    rows(table, View.POLICY)
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


def test_rows_to_score_are_read_one_by_one_without_labels(write):
    lines = ['{"key": 3, "text": "a", "answer": "b", "size": 99}', '{"text": "c", "answer": ""}', '{"text": "d"}']
    table = Table(
        predict=write("\n".join(lines), "rows.jsonl"),
        question="text",
        id="key",
        columns={"size": "elsewhere"},
        subset="x",
    )
    found = table.stream(View.REWARD, Split.PREDICT, PREFERENCES, seed=0)
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
    table = Table(predict=path, where={"lang": ["fr"]}, constants={"answer": "c"})
    streamed = list(table.stream(View.REWARD, Split.PREDICT, PREFERENCES, seed=0))
    assert streamed == rows(table, View.REWARD, Split.PREDICT)
    assert [(row.question, row.answer, row.id) for row in streamed] == [("q1", "c", "n1"), ("q3", "c", "n3")]


def test_a_table_with_nothing_but_rows_to_score_cannot_be_trained_on(write):
    with pytest.raises(ValueError, match=r"data\.source\.path is not given"):
        rows(Table(predict=write("question,answer\na,b\n")))
