"""Reads tables row by row and remembers where each row stands."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moslim.errors import MissingFileError, UsageError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass
class Record:
    """One row of a table.

    Args:
        place: Where it stands, e.g. ``ratings.csv, line 7``.
        fields: Value by column name. A JSON object may lack some; :func:`completed` fills them in.
    """

    place: str
    fields: dict[str, Any]


def is_file_name(name: str) -> bool:
    """Whether a name is that of a table file, rather than of a Hub data set or one of its splits."""
    return Path(name.removesuffix(".gz")).suffix.lower() in SUFFIXES


def scan_file(path: str) -> Iterator[Record]:
    """Reads a CSV, TSV, JSON Lines or parquet file row by row; all but parquet may be gzipped (``.gz``).

    Raises:
        MissingFileError: There is no such file.
        UsageError: A line cannot be read; the message names file and line.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"data.source: there is no file '{path}' (looked in {Path.cwd()})")
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (fields for batch in batches for fields in batch.to_pylist())
        yield from (Record(f"{path}, row {number}", fields) for number, fields in enumerate(rows, 1))
        return
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        if suffix in (".csv", ".tsv"):
            yield from _csv(path, file, "\t" if suffix == ".tsv" else ",")
        else:
            yield from _json(path, file)


def read_file(path: str) -> list[Record]:
    """Reads such a file at once; every record has the columns of all."""
    return completed(scan_file(path))


def scan_hub(name: str, split: str, folder: str | None = None, config_name: str | None = None) -> Iterator[Record]:
    """Reads a split of a Hub data set (or of a local folder in the Hub's layout), or of a folder in it, row by row.

    Args:
        name: The data set.
        split: Its split.
        folder: Folder in it; None = the whole.
        config_name: Which of its configurations; None = its default.
    """
    from datasets import load_dataset

    rows = load_dataset(name, config_name, data_dir=folder, split=split)
    yield from (Record(f"{name}[{split}], row {number}", dict(fields)) for number, fields in enumerate(rows, 1))


def completed(records: Iterable[Record]) -> list[Record]:
    """Gives every record the columns of all, since a JSON object may leave out what it lacks."""
    rows = list(records)
    columns = {column: None for record in rows for column in record.fields}
    return [Record(record.place, {**columns, **record.fields}) for record in rows]


def _csv(path: str, file: IO[str], delimiter: str) -> Iterator[Record]:
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            line = reader.line_num
            if None in fields:
                raise UsageError(
                    f"{path}, line {line}: more fields than the {len(reader.fieldnames or ())} of the header"
                )
            if None in fields.values():
                absent = [name for name, value in fields.items() if value is None]
                raise UsageError(f"{path}, line {line}: the row ends before field '{absent[0]}'")
            yield Record(f"{path}, line {line}", fields)
    except csv.Error as error:
        raise UsageError(f"{path}, line {line + 1}: {error}") from error


def _json(path: str, file: IO[str]) -> Iterator[Record]:
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); write one object per line"
            ) from error
        if not isinstance(fields, dict):
            raise UsageError(f"{path}, line {number}: {text.strip()[:40]!r} is no JSON object")
        yield Record(f"{path}, line {number}", fields)
