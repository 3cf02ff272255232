"""Mutated tables of every format: each gives rows, or an error that says where."""

import gzip
import io
import json
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moslim.data.sources.labels import Scale
from moslim.data.sources.layouts import SideBySide, Verdict
from moslim.data.sources.table import Table
from moslim.data.types import RowKind, Split
from moslim.evaluation.best_of import read_choices
from moslim.preferences import PreferenceSet
from moslim.utils.errors import UsageError

PREFERENCES = PreferenceSet({"size": ["low", "mid", "high"], "heat": ["cold", "hot"], "calm": ["no", "yes"]})
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
ROWS = [
    {
        "question": CHAT if i % 2 else f"why {i}?",
        "answer": f"because {i}",
        "size": i % 3,
        "heat": [i % 2, 1],
        "calm": 0.5,
        "raters": 2,
        "worse": f"no {i}",
        "comparison_dimensions": ["size", "heat"],
        "by": [0.5, 1],
        "requested": {"size": 1},
        "lang": "en",
        "id": i,
    }
    for i in range(6)
]
OPTIONS = {
    "counts": {"calm": "raters"},
    "rejected": "worse",
    "comparison_dimensions": "comparison_dimensions",
    "margin": "by",
    "requested": "requested",
    "subset": "lang",
    "columns": {"size": "size", "heat": "heat.*", "calm": "calm"},
    "keep": ["by"],
}
CHOICES = [
    {"question": "q", "paraphrases": [CHAT], "answers": ["a", "b"], "preference": {"size": 1}, "right": 0}
    for _ in range(3)
]
VALUES = [
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "3e7",
        "1e400",
        "-0",
        "1" * 500,
        "9" * 5000,
        "4.000000000000000000001",
        "NaN",
    ),
    *(
        "Infinity",
        '""',
        '" "',
        '"0_1"',
        '"+1"',
        '"1e0"',
        '"\\u0663"',
        '"\\ud83d"',
        '"\\u0000"',
        "[]",
        "{}",
        "[[1]]",
        "[null]",
    ),
    *(
        "[" * 3000 + "]" * 3000,
        '{"a":' * 3000 + "1" + "}" * 3000,
        '"' + "x" * 100_000 + '"',
        "2.9",
        "30000000",
        '"inf"',
    ),
    *(
        '[{"role": "user"}]',
        '[{"role": {}, "content": "u"}]',
        '"[{\\"role\\": \\"user\\"}]"',
        '[["size"]]',
        '{"size": []}',
    ),
    *(
        "[1, [2]]",
        "1",
        '{"role": "user", "content": "u"}',
        "[1, 2]",
        "\"[{'role': 'user'\"",
        "-1e-400",
        "0.1",
        '{"size": true}',
    ),
]
CELLS = [json.loads(value) for value in VALUES if value.startswith('"')] + [
    value for value in VALUES if not value.startswith(('"', "[[[", '{"a":{'))
]


def json_text(rows: list[dict], rng: random.Random) -> str:
    """JSON Lines of the rows, in one of which a value is another one."""
    lines = [json.dumps(row) for row in rows]
    place = rng.randrange(len(lines))
    fields = {name: json.dumps(value) for name, value in rows[place].items()}
    fields[rng.choice(list(fields))] = rng.choice(VALUES)
    lines[place] = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    return "\n".join(lines) + "\n"


def csv_text(rng: random.Random | None = None) -> str:
    """A CSV file, in which a cell is another one if a generator is given."""
    names = ["question", "answer", "size", "calm", "raters", "worse", "by", "lang"]
    cells = [[f"why {i}", "so", str(i % 3), "0.5", "2", "no", "1", "en"] for i in range(4)]
    if rng is not None:
        rng.choice(cells)[rng.randrange(len(names))] = rng.choice(CELLS)
    quoted = ['"' + cell.replace('"', '""') + '"' for row in cells for cell in row]
    lines = [",".join(quoted[i : i + len(names)]) for i in range(0, len(quoted), len(names))]
    return "\n".join([",".join(names), *lines]) + "\n"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, taken out, repeated or cut off."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 1, 4, 40]))
    return rng.choice(
        [
            lambda: content[:start],
            lambda: content[:start] + content[end:],
            lambda: content[:end] + content[start:],
            lambda: content[:start] + rng.randbytes(end - start) + content[end:],
            lambda: (
                content[:start]
                + rng.choice([b"\xff", b"\0", b'"', b"\r", b"\xed\xa0\xbd", b"{", b","])
                + content[start:]
            ),
        ]
    )()


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    rows = [{**row, "question": row["answer"], "id": str(row["id"])} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def zip_bytes(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", text)
    return buffer.getvalue()


def cases(name: str, rng: random.Random) -> bytes:
    """A mutated file of a kind."""
    if name in ("value.jsonl", "pair.jsonl"):
        return json_text(ROWS, rng).encode()
    if name == "choices.jsonl":
        return json_text(CHOICES, rng).encode()
    if name == "list.json":
        return ("[" + ",\n".join(json_text(ROWS, rng).splitlines()) + "]").encode()
    if name == "cell.csv":
        return csv_text(rng).encode(errors="surrogatepass")
    return damaged(whole(name), rng)


def whole(name: str) -> bytes:
    """A file as it should be."""
    files = {
        "bytes.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "bytes.csv": csv_text().encode(),
        "wide.csv": csv_text().encode("utf-16"),
        "bytes.json": json.dumps(ROWS, indent=1).encode(),
        "rows.parquet": parquet_bytes(),
        "rows.csv.gz": gzip.compress(csv_text().encode()),
        "rows.csv.zip": zip_bytes(csv_text()),
    }
    return files[name]


def reader(name: str, path: str) -> Callable[[], object]:
    """What reads the file."""
    if name == "choices.jsonl":
        return lambda: read_choices(path, PREFERENCES)
    options = (
        OPTIONS
        if name.endswith((".jsonl", ".json", ".parquet"))
        else {"counts": OPTIONS["counts"], "margin": "by", "rejected": "worse"}
    )
    if name == "pair.jsonl":
        sides = {"answer": "answer", "size": "size"}, {"answer": "worse"}
        layout = SideBySide(*sides, verdicts=[Verdict("by", graded=True)])
        options = {**OPTIONS, "layout": layout, "rejected": "rejected", "margin": "margin"}
    if name == "rows.parquet":
        options = {**options, "scales": {"size": Scale(bins=[0.5, 1.5])}, "where": {"lang": "en"}}
    return lambda: Table(path, **options).rows(RowKind.LABELLED, Split.TRAIN, PREFERENCES, seed=0)


NAMES = (
    *("value.jsonl", "pair.jsonl", "choices.jsonl", "list.json", "cell.csv", "bytes.jsonl", "bytes.csv", "wide.csv"),
    *("bytes.json", "rows.parquet", "rows.csv.gz", "rows.csv.zip"),
)
WITHOUT_A_LINE = re.compile("the table has no rows|the archive cannot be read|holds |parquet, row|validation_share")


def outcome(name: str, content: bytes, path: Path) -> str | None:
    """What is wrong with how a file was read; None = nothing."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(name, str(path))()
        except UsageError as error:
            text = str(error)
            if path.name not in text:
                return f"no file in {text[:300]!r}"
            if not re.search(r", (line|row) \d", text) and not WITHOUT_A_LINE.search(text):
                return f"no line in {text[:300]!r}"
            if len(text) > 2000:
                return f"{len(text)} characters: {text[:300]!r}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_file_gives_rows_or_file_and_line(name, tmp_path):
    rng = random.Random(f"seed {name}")
    for i in range(25):
        content = cases(name, rng)
        assert outcome(name, content, tmp_path / name) is None, (i, content[:400])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_files_themselves_are_read(tmp_path):
    for name in ("bytes.jsonl", "bytes.json", "rows.parquet", "bytes.csv", "wide.csv", "rows.csv.gz", "rows.csv.zip"):
        (tmp_path / name).write_bytes(whole(name))
        assert len(reader(name, str(tmp_path / name))()) == (4 if "csv" in name else 6)
