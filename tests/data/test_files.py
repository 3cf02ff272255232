import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from moslim.data.sources import conversations as chats
from moslim.data.sources.labels import Scale
from moslim.data.sources.records import read_file, scan_file
from moslim.data.sources.table import Table
from moslim.data.sources.table_files import is_file_name
from moslim.data.types import RowKind, Split
from moslim.preferences import PreferenceSet

PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"]})
LINES = [{"question": f"q{i}", "answer": "é", "size": i % 3} for i in range(4)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CSV = "question,answer,size\n" + "".join(f"q{i},é,{i % 3}\n" for i in range(4))
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)


@pytest.fixture
def write(tmp_path):
    """Writes a file, given as text or bytes, and returns its path."""

    def write(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


def rows(path, split=Split.TRAIN, kind=RowKind.LABELLED, **options):
    return Table(path, **options).rows(kind, split, PREFERENCES, seed=0)


def questions(path, **options):
    return [row.question for row in rows(path, **options)]


def zipped(*files):
    """The bytes of an archive of (name, content)."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", CSV.encode()),
        ("rows.CSV", CSV.encode("utf-8-sig")),
        ("rows.csv", CSV.encode("utf-16")),
        ("rows.csv", CSV.encode("utf-32")),
        ("rows.csv", CSV.replace("\n", "\r\n").encode()),
        ("rows.csv", CSV.replace("\n", "\r").encode()),
        ("rows.tsv", CSV.replace(",", "\t").encode()),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.csv.bz2", bz2.compress(CSV.encode("utf-16"))),
        ("rows.csv.xz", lzma.compress(CSV.encode())),
        ("rows.csv.zip", zipped(("rows.csv", CSV))),
        ("rows.zip", zipped(("part/rows.jsonl", JSONL), ("__MACOSX/part/._rows.jsonl", "x"))),
        ("rows.jsonl", JSONL.encode("utf-8-sig")),
        ("rows.ndjson", JSONL.encode()),
        ("rows.json", JSONL.encode()),
        ("rows.json", json.dumps(LINES).encode()),
        ("rows.json", json.dumps(LINES, indent=2).encode("utf-16")),
        ("rows.jsonl", ("\n\n " + json.dumps(LINES) + "\n").encode()),
    ],
)
def test_tables_are_read_as_they_come(write, name, content):
    found = rows(write(name, content))
    assert [(row.question, row.answer, row.levels["size"]) for row in found] == [
        (line["question"], "é", line["size"]) for line in LINES
    ]


def test_parts_of_one_table(write, tmp_path):
    for part in range(3):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(LINES[part : part + 1]), tmp_path / f"part-{part}.parquet"
        )
    assert questions(str(tmp_path / "part-*.parquet")) == ["q0", "q1", "q2"]
    write("a-0.csv", "question,answer,size\nq,a,1\n")
    write("a-1.csv", "question,answer\nq,a\n")
    with pytest.raises(ValueError, match=r"a-1\.csv, line 2: other columns than in .*a-0\.csv: size"):
        rows(str(tmp_path / "a-?.csv"))
    with pytest.raises(ValueError, match=r"no file matches '.*none-\*\.csv'"):
        rows(str(tmp_path / "none-*.csv"))


def test_a_folder_of_parts_is_read_as_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parts").mkdir()
    for part in range(2):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(LINES[part : part + 1]), tmp_path / "parts" / f"part-{part}.parquet"
        )
    assert questions(str(tmp_path / "parts")) == ["q0", "q1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.xlsx", "rows.xlsx: a .xlsx is not read: save the sheet as CSV"),
        ("rows.feather", "convert it to parquet"),
        ("rows.csv.zst", "unpack it"),
        ("rows.tar.gz", "rows.tar.gz: a .gz is not read: unpack it"),
        ("rows.parquet.gz", "parquet is compressed already: unpack"),
        ("rows.txt", "write its rows as JSON Lines or CSV"),
        ("rows.odd", "rows.odd: a .odd is not read"),
        ("rows", "a file without an ending is not read"),
        ("two.zip", "two.zip: holds a.csv, b.csv: unpack it"),
        ("none.zip", "none.zip: holds no file: unpack it"),
    ],
)
def test_other_files_are_refused_by_name(write, name, message):
    content = {"two.zip": zipped(("a.csv", CSV), ("b.csv", CSV)), "none.zip": zipped()}.get(name, b"x")
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        rows(write(name, content))


@pytest.mark.parametrize(
    "name", ["rows.ndjson", "rows.xlsx", "rows.csv.zip", "part-*.parquet", "data/rows.jsonl", "./x", "rows.odd", "/a/b"]
)
def test_what_looks_like_a_file_name_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"(there is no file|no file matches) '{name.replace('*', '.')}' ".replace("/a", "/a")
    ):
        rows(name)
    with pytest.raises(ValueError, match="is an address: download the file"):
        rows("https://example.org/rows.csv")


def test_a_folder_of_the_owner_does_not_hide_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nvidia").mkdir()
    assert not is_file_name("nvidia/HelpSteer2")
    assert is_file_name("nvidia/rows.odd")


def test_a_line_of_white_space_is_no_row(write):
    assert questions(write("a.csv", "question,answer,size\nq,a,1\n  \n\nr,b,2\n \n")) == ["q", "r"]


def test_an_encoding_may_be_named(write):
    path = write("rows.csv", CSV.encode("cp1252"))
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: not utf-8 text \(byte 0xe9.*`encoding`: cp1252"):
        rows(path)
    assert rows(path, encoding="cp1252")[0].answer == "é"
    with pytest.raises(ValueError, match=r"data\.source\.encoding: 'cp12' is no encoding"):
        rows(path, encoding="cp12")
    with pytest.raises(ValueError, match="'base64' is no encoding"):
        rows(path, encoding="base64")
    with pytest.raises(ValueError, match=r"line 2: not ascii text .*give another `encoding`"):
        rows(path, encoding="ascii")
    marked = write("marked.csv", CSV.encode("utf-8-sig"))
    with pytest.raises(ValueError, match="line 1: begins with the mark of utf-8-sig, not of cp1252"):
        rows(marked, encoding="cp1252")
    assert questions(marked, encoding="utf8") == questions(write("p.csv", CSV), encoding="UTF-8")
    unmarked = write("wide.csv", CSV.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"wide\.csv, line 1: holds zero bytes, .*`encoding`, e\.g\. utf-16-le"):
        rows(unmarked)
    assert questions(unmarked, encoding="utf-16-le") == ["q0", "q1", "q2", "q3"]


def test_the_line_of_a_byte_that_is_no_text_is_named_far_into_a_file(write):
    for line in (2, 3000, 9000):
        lines = [f"q{i},ä,1" for i in range(10_000)]
        content = "\n".join(["question,answer,size", *lines]).encode().split(b"\n")
        content[line - 1] = b"q,\xe4\xc3,1"
        with pytest.raises(ValueError, match=rf"rows\.csv, line {line}: not utf-8 text \(byte 0xe4"):
            rows(write("rows.csv", b"\n".join(content)))


def test_damaged_files_are_named(write):
    packed = gzip.compress(CSV.encode() * 1 + b"".join(f"p{i},{i * i},1\n".encode() for i in range(5000)))
    for name, content in [
        ("cut.csv.gz", packed[:-2000]),
        ("flipped.csv.gz", packed[:5000] + bytes([packed[5000] ^ 255]) + packed[5001:]),
        ("plain.csv.gz", CSV.encode()),
        ("cut.jsonl.xz", lzma.compress(JSONL.encode())[:-9]),
        ("plain.csv.bz2", CSV.encode()),
    ]:
        with pytest.raises(ValueError, match=rf"{name}, line \d+ or later: the file is damaged, cut off or locked"):
            rows(write(name, content))
    with pytest.raises(ValueError, match=r"rows\.zip: the archive cannot be read .*get it again"):
        rows(write("rows.zip", zipped(("rows.csv", CSV))[:-30]))
    with pytest.raises(ValueError, match=r"rows\.parquet, row 1 or later: the table is damaged"):
        rows(write("rows.parquet", b"PAR1 no"))


def test_fields_of_any_length_are_read(write):
    long = "x" * 200_000
    assert rows(write("rows.csv", f"question,answer,size\nq,{long},1\n"))[0].answer == long
    assert rows(write("rows.jsonl", json.dumps({"question": "q", "answer": long, "size": 1})))[0].answer == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer,size,size\nq,a,1,2\n", r"a.csv, line 1: column 'size' is there twice"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "a", "size": 1, "size": 2}',
            r"a.jsonl, line 1: field 'size' is given twice",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "a\\ud83d", "size": 1}',
            r"a.jsonl, line 1, field 'answer': holds half of",
        ),
        (
            "a.json",
            '[\n{"question": [{"role": "user", "content": "\\udc00x"}], "answer": "a", "size": 1}]',
            r"a.json, line 2, field 'question.0.content': holds half of a character",
        ),
        (
            "a.jsonl",
            f'{{"question": "q", "answer": "a", "size": {"9" * 5000}}}',
            r"a.jsonl, line 1: an integer of 5000 digits",
        ),
        ("a.jsonl", '{"a": ' + "[" * 5000 + "]" * 5000 + "}", r"a.jsonl, line 1: more than 100 levels"),
        ("a.jsonl", '{"a": ' + "[" * 300 + "]" * 300 + "}", r"a.jsonl, line 1: more than 100 levels"),
        ("a.json", '[{"question": "q", "answer": "a", "size": 1},\n\n{"question": ]', r"a.json, line 3: not JSON"),
        ("a.json", '[{"question": "q", "answer": "a", "size": 1}\n', r"a.json, line 2: the list of objects is cut off"),
        (
            "a.json",
            '[{"question": "q", "answer": "a", "size": 1}] {}',
            r"a.json, line 1: the list of objects is cut off, or",
        ),
        ("a.json", "[1]", r"a.json, line 1: 1 is no JSON object"),
        ("a.json", '{\n"data": []}', r"a.json, line 1: not JSON .*or one list of objects"),
        ("a.csv", '"question\nanswer,size\n', r"a.csv, line 1: unexpected end of data"),
        ("a.csv", 'question,answer,size\n"q\nq",a,1\n"q\r\nr\ns",a,9\n', r"a.csv, line 4, field 'size'"),
        ("a.csv", "question;answer;size\nq;a;1\n", r"a.csv, line 1: the header .* has no ',', but ';': part columns"),
        ("a.csv", "question\tanswer\tsize\nq\ta\t1\n", r"a.csv, line 1: the header .* has no ',', but '.t': part"),
        ("a.tsv", "question,answer,size\nq,a,1\n", r"a.tsv, line 1: the header .* has no '.t', but ',': part columns"),
        (
            "a.jsonl",
            '{"question": "q", "answer": "a", "size": 1e400}',
            r"a.jsonl, line 1, field 'size': value 1e400 is",
        ),
        (
            "a.jsonl",
            '{"question": "q", "answer": "a", "size": 1.0000000000000000000001}',
            r"a.jsonl, line 1, field 'size': value 1.0000000000000000000001 is not a whole number",
        ),
        (
            "a.csv",
            gzip.compress(b"question,answer,size\nq,a,1\n", mtime=0),
            r"a.csv, line 1: is a gzip file: .* ending .gz",
        ),
        ("a.csv", b"PK\x03\x04\x14\0", r"a.csv, line 1: is a zip archive or a spreadsheet"),
        ("a.jsonl", b"PAR1\x15\x04", r"a.jsonl, line 1: is a parquet file"),
        ("a.jsonl", LFS, r"a.jsonl, line 1: is a pointer of Git LFS, .*`git lfs pull`"),
        ("a.csv", LFS, r"a.csv, line 1: is a pointer of Git LFS"),
        ("a.parquet", LFS, r"a.parquet, line 1: is a pointer of Git LFS"),
    ],
)
def test_what_cannot_be_read_has_a_place(write, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        rows(write(name, content))
    assert len(str(error.value)) < 500


def test_a_column_that_is_twice_in_parquet_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["size", "size"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="column 'size' is there twice"):
        rows(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_narrow_floats_of_parquet_are_compared_as_written(tmp_path, kind):
    columns = {"question": ["q", "r", "s"], "answer": ["a"] * 3}
    scores = [0.29, 0.3, 0.7]
    path, scale = str(tmp_path / "rows.parquet"), {"size": Scale(bins=[0.3, 0.7])}
    size = pyarrow.array(scores, kind)
    pyarrow.parquet.write_table(pyarrow.table({**columns, "size": size}), path)
    assert [row.levels["size"] for row in rows(path, scales=scale)] == [0, 1, 2]
    nested = pyarrow.array([{"of": [score]} for score in scores], pyarrow.struct({"of": pyarrow.list_(kind)}))
    pyarrow.parquet.write_table(pyarrow.table({**columns, "by": nested}), path)
    found = rows(path, scales=scale, columns={"size": "by.of.*"})
    assert [row.levels["size"] for row in found] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ""),
        ("a.csv", " \n\n"),
        ("a.csv", "question,answer,size\n"),
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", "[]"),
        ("a.json", " [ \n]\n"),
        ("a.csv.gz", gzip.compress(b"", mtime=0)),
        ("a.parquet", b""),
    ],
)
def test_an_empty_file_is_named_as_empty(write, name, content):
    path = write(name, content)
    said = (
        rf"{name}: the table has no rows: the file is empty"
        if content != " \n\n"
        else f"{name}.*(names no columns|empty)"
    )
    with pytest.raises(ValueError, match=said):
        rows(path)
    with pytest.raises(ValueError, match=said):
        list(Table(predict=path).stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, seed=0))
    with pytest.raises(ValueError, match=said):
        read_file(path)


def test_rows_to_score_that_where_leaves_none_of_are_an_error(write):
    table = Table(predict=write("a.csv", "question,answer,lang\nq,a,de\n"), where={"lang": ["en"]})
    with pytest.raises(ValueError, match=r"a\.csv: no row has the values in `where`"):
        list(table.stream(RowKind.LABELLED, Split.PREDICT, PREFERENCES, seed=0))


@pytest.mark.parametrize("option", ["validation_share", "test_share"])
def test_a_share_that_selects_no_row_is_an_error(write, option):
    path = write("a.csv", "question,answer,size\nq,a,0\nr,b,1\n")
    with pytest.raises(
        ValueError, match=rf"data\.source\.{option}: 0\.0001 of the questions of .*a\.csv selects none of its 2 rows"
    ):
        rows(path, **{option: 0.0001})
    for share in (float("nan"), float("inf"), -0.1, 1.0):
        with pytest.raises(ValueError, match="must leave something to train on"):
            Table(path, **{option: share})


def test_a_large_file_is_read_row_by_row(write):
    path = write("rows.csv", "question,answer,size\n" + "q,a,1\n" * 200_000 + "q,a\n")
    found = scan_file(path)
    assert [next(found).place for _ in range(3)][-1].endswith("rows.csv, line 4")


# --- chats in cells


def cell(text):
    return '"' + text.replace('"', '""') + '"'


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def test_a_chat_written_as_json_in_a_cell_is_a_chat(write):
    path = write("rows.csv", f"question,answer,size\n{cell(json.dumps(CHAT))},a,1\n")
    assert rows(path)[0].question == CHAT
    assert questions(path, chat=chats.PlainText()) == [json.dumps(CHAT)]
    other = [{"from": "human", "value": "u"}]
    path = write("rows.jsonl", json.dumps({"question": json.dumps(other), "answer": "a", "size": 1}))
    path_of_numbered = write(
        "n.csv", f"question,answer,size\n{cell(json.dumps([{'id': 1, **turn} for turn in CHAT]))},a,1\n"
    )
    assert [turn["content"] for turn in rows(path_of_numbered)[0].question] == ["s", "u"]
    chat = chats.Messages("from", "value", {"human": "user"})
    assert rows(path, chat=chat)[0].question == [{"role": "user", "content": "u"}]
    with pytest.raises(ValueError, match="line 1, field 'question': message 0 of a question is"):
        rows(path)


@pytest.mark.parametrize(
    "text",
    [
        str(CHAT),
        json.dumps(CHAT)[:-5],
        json.dumps(CHAT[1]),
        json.dumps({"messages": CHAT}),
        '[{"id": 1, "from": "human", "value": "u"}]',
        '[{"speaker": "user", "text": "u"}]',
        '[["user", "u"], ["assistant", "a"]]',
        "[('human', 'u')]",
        json.dumps(json.dumps(CHAT)),
        '[{"role": "user", "content": "\\ud83d"}]',
        '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]',
    ],
)
def test_what_looks_like_a_chat_is_never_one_user_turn(write, text):
    path = write("rows.csv", f"question,answer,size\n{cell(text)},a,1\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 2, field 'question': "):
        rows(path)


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": 1}] is what?',
        '{"role": "admin"} means what?',
        "[[1, 2]]",
        '{"a": 1}',
        "[role]",
        '[{"id": 1, "role": 2}]',
    ],
)
def test_other_texts_stay_texts(write, text):
    assert questions(write("rows.csv", f"question,answer,size\n{cell(text)},a,1\n")) == [text]


# --- texts and numbers


@pytest.mark.parametrize(
    ("values", "found", "levels"),
    [
        ({1: 0, 3: 1}, ["1", "3"], [0, 1]),
        ({1: 0, 3: 1}, [1, 3.0], [0, 1]),
        ({False: 0, True: 1}, [False, True], [0, 1]),
        ({"false": 0, "true": 1}, [False, "TRUE"], [0, 1]),
        ({"no": 0, "yes": 1}, ["no", " yes "], [0, 1]),
        ({0.5: 0, 1: 1}, [0.5, 1.0], [0, 1]),
    ],
)
def test_values_are_compared_as_they_are_written(values, found, levels):
    assert [Scale(values=values).level(value) for value in found] == levels


def test_values_that_mean_one_thing_are_refused():
    for values in ({"1": 0, "1.0": 1}, {"true": 0, "True": 1}, {1: 0, "1": 1}, {"a": 0, " a ": 1}):
        with pytest.raises(ValueError, match="are one value with two levels"):
            Scale(values=values)
    for values in ({"a": -1}, {"a": True}, {"a": 1.0}, {"a": "1"}):
        with pytest.raises(ValueError, match="give 0 or more"):
            Scale(values=values)
    for bins in ([float("inf")], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            Scale(bins=bins)


@pytest.mark.parametrize(
    ("value", "scale"),
    [(True, {"no": 0, "1": 1}), ("No", {"no": 0}), ("1.0", {1: 0}), (1, {"true": 1}), ("x" * 10**6, {"no": 0})],
)
def test_values_that_no_key_means_are_refused(value, scale):
    with pytest.raises(ValueError, match="is none of") as error:
        Scale(values=scale).level(value)
    assert len(str(error.value)) < 200


def test_where_and_missing_take_values_as_written(write):
    lines = [
        {"question": f"q{i}", "answer": "a", "size": 1, "kept": kept}
        for i, kept in enumerate([False, "false", "no", 1, 1.0, "1", "1.0", None, "", "01"])
    ]
    path = write("rows.jsonl", "\n".join(map(json.dumps, lines)))

    def kept(*texts):
        return questions(path, where={"kept": list(texts)})

    assert kept("no") == ["q2"] and kept("false") == ["q0", "q1"] and kept("01") == ["q9"]
    assert kept("1") == kept(1) == ["q3", "q4", "q5"] and kept("1.0") == ["q3", "q4", "q6"]
    assert Scale(missing=["0", "no"]).is_missing(0) and not Scale(missing=["0"]).is_missing("0.0")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "is a truth value: give `values`"),
        ("0_1", "is not a number"),
        ("+1", "is not a number"),
        ("1e0", "is not a number"),
        ("\uff12", "is not a number"),
        ("\u0663", "is not a number"),
        ([[1]], "is not a number"),
        ("y" * 10**6, "is not a number"),
    ],
)
def test_labels_that_are_no_plain_numbers_are_refused(write, value, said):
    path = write("rows.jsonl", json.dumps({"question": "q", "answer": "a", "size": value}))
    for scale in (Scale(), Scale(bins=[0.5])):
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1, field 'size': value .*{said}") as error:
            rows(path, scales={"size": scale})
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("label", ["4.000000000000000000001", "1e400", "1.5", "-1"])
def test_numbers_that_json_rounds_are_not_rounded(write, label):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1, field 'size': value "):
        rows(
            write("rows.jsonl", f'{{"question": "q", "answer": "a", "size": {label}}}'),
            scales={"size": Scale(offset=-2)},
        )


@pytest.mark.parametrize(
    ("share", "raters", "said"),
    [
        ("0.5", 2.9, "not a whole number"),
        ("0.5", "2.9", "not a whole number"),
        ("0.5", True, "truth value"),
        ("true", 2, "not a number"),
        (0.5, 30_000_000, "30000000 raters: give 0 to 10000"),
        (0.5, -2, "-2 raters"),
        ("1e0", 2, "not a number"),
        (1.002, 2, "is no share of 2 votes"),
        (-0.001, 2, "is no share of 2 votes"),
    ],
)
def test_shares_and_counts_are_plain_numbers(write, share, raters, said):
    path = write("rows.jsonl", json.dumps({"question": "q", "answer": "a", "heat": share, "raters": raters}))
    table = Table(path, counts={"heat": "raters"})
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1, field 'heat': .*{said}"):
        table.rows(RowKind.LABELLED, Split.TRAIN, PreferenceSet({"heat": ["no", "yes"]}), seed=0)


@pytest.mark.parametrize(
    "margin", ["1e400", "true", '"inf"', '"1e0"', "Infinity", "[1, true]", "[[1]]", '"+1"', "1" * 60]
)
def test_margins_are_plain_numbers(write, margin):
    path = write("rows.jsonl", f'{{"question": "q", "answer": "a", "size": 1, "worse": "w", "by": {margin}}}')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1, field 'by': value "):
        rows(path, rejected="worse", margin="by")


def test_compared_that_is_no_list_of_names_has_a_place(write):
    for compared in ([["size"]], [None], "size", [1], {"size": 1}):
        path = write(
            "a.jsonl", json.dumps({"question": "q", "answer": "a", "size": 1, "worse": "w", "about": compared})
        )
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1, field 'about': .*is no list of dimensions"):
            rows(path, rejected="worse", comparison_dimensions="about")


def test_a_constant_does_not_replace_a_column(write):
    with pytest.raises(ValueError, match=r"a\.csv, line 2: has a field 'answer' already"):
        rows(write("a.csv", "question,answer,size\nq,a,1\n"), constants={"answer": "b"})


def test_rows_without_a_part_or_a_group(write):
    path = write(
        "a.jsonl",
        "".join(
            json.dumps({**line, "lang": lang, "g": lang}) + "\n"
            for line, lang in zip(LINES, ["en", None, "", "de"], strict=True)
        ),
    )
    assert [row.subset for row in rows(path, subset="lang")] == ["en", None, None, "de"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, field 'g': the group is empty"):
        rows(path, group="g")
