"""Tables row by row, each with its place, and fields of a row.

Reads tables row by row and remembers where each row stands.

What is odd about some rows without being wrong: said once for a table, not once per row.

Finds a field of a row, also inside nested objects and lists.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moslim.data.sources.table_files import check_content, open_table, read_lines, table_files, table_suffix
from moslim.utils.errors import MissingFileError, UsageError, json_float, listed, quoted

_DEEPEST = 100
"""Most levels of objects and lists in each other."""
_LONGEST_INTEGER = 4000
_LONGEST_FIELD = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s*")


@dataclass
class Record:
    """One row of a table.

    Args:
        place: Where it stands, e.g. ``ratings.csv, line 7``.
        fields: Value by column name. A JSON object may lack some; :func:`completed` fills them in.
    """

    place: str
    fields: dict[str, Any]


def scan_file(name: str, encoding: str | None = None) -> Iterator[Record]:
    """Reads a CSV, TSV, JSON Lines, JSON or parquet file, or those that a pattern matches, row by row.

    Text may be compressed (``.gz``, ``.bz2``, ``.xz``, or a ``.zip`` with one table).

    Args:
        name: File, or a pattern such as ``part-*.parquet``; its files are read in alphabetical order.
        encoding: Of text; None = what its byte order mark says, else UTF-8.

    Raises:
        MissingFileError: There is no such file.
        UsageError: A line cannot be read; the message names file and line. Or there are no rows.
    """
    files, columns, count = table_files(name), None, 0
    for file in files:
        for position, record in enumerate(_scan(file, encoding)):
            if position == 0 and len(files) > 1 and table_suffix(file) in (".csv", ".tsv", ".parquet"):
                columns = columns or (file, set(record.fields))
                if columns[1] != set(record.fields):
                    raise UsageError(
                        f"{record.place}: other columns than in {columns[0]}: "
                        f"{listed(sorted(columns[1] ^ set(record.fields)))}; the files of '{name}' must be one table"
                    )
            count += 1
            yield record
    if not count:
        raise UsageError(f"{name}: the table has no rows: the file is empty, or has nothing but a header")


def _scan(file: str, encoding: str | None) -> Iterator[Record]:
    if table_suffix(file) == ".parquet":
        yield from _parquet(file)
        return
    lines = read_lines(file, encoding)
    if table_suffix(file) in (".csv", ".tsv"):
        yield from _csv(file, lines, "\t" if table_suffix(file) == ".tsv" else ",")
    else:
        yield from _json(file, lines)


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

    Raises:
        MissingFileError: It cannot be read.
        UsageError: It has no rows.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config_name, data_dir=folder, split=split)
    except Exception as error:  # of many kinds: network, access, no such split, damaged files
        raise MissingFileError(
            f"data.source: '{name}' is no file here, and its split '{split}' cannot be read as a data set of the Hub: "
            f"{type(error).__name__}: {quoted(str(error), 400)}"
        ) from error
    number = 0
    for number, fields in enumerate(_guarded(f"{name}[{split}]", rows), 1):
        yield Record(f"{name}[{split}], row {number}", dict(fields))
    if not number:
        raise UsageError(f"{name}[{split}]: the table has no rows: the split is empty")


def completed(records: Iterable[Record]) -> list[Record]:
    """Gives every record the columns of all, since a JSON object may leave out what it lacks."""
    rows = list(records)
    columns = {column: None for record in rows for column in record.fields}
    return [Record(record.place, {**columns, **record.fields}) for record in rows]


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Returns the object that a JSON text holds.

    Raises:
        UsageError: It holds none, or one that cannot be used: a name twice, half of a character, an integer of
            thousands of digits, or more than a hundred levels.
    """
    if not text.strip():
        raise UsageError(f"{place}: is empty, and should hold a JSON object")
    value = parse_json(text, place)[0]
    if not isinstance(value, dict):
        raise UsageError(f"{place}: {quoted(text.strip())} is no JSON object; write one object per line")
    return value


def parse_json(text: str, place: str, start: int = 0, whole: bool = True) -> tuple[Any, int]:
    """Returns the JSON value at a position of a text, and where it ends.

    Args:
        text: The text.
        place: Where it stands, for error messages.
        start: The position.
        whole: Whether nothing may follow the value.

    Raises:
        UsageError: There is none, or one that cannot be used; see :func:`parse_object`.
    """
    try:
        value, end = _DECODER.raw_decode(text, _after_space(text, start))
        if whole and _after_space(text, end) < len(text):
            raise json.JSONDecodeError("Extra data", text, _after_space(text, end))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{place}: not JSON ({error.msg} at column {error.pos - text.rfind(chr(10), 0, error.pos)}); "
            "write one object per line, or one list of objects"
        ) from error
    except RecursionError:
        raise UsageError(f"{place}: more than {_DEEPEST} levels of objects and lists in each other") from None
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    if text.count("[", start, end) + text.count("{", start, end) > _DEEPEST and _depth(value) > _DEEPEST:
        raise UsageError(f"{place}: more than {_DEEPEST} levels of objects and lists in each other")
    if text.find("\\u", start, end) >= 0 and (found := _half_character(value, "")) is not None:
        raise UsageError(
            f"{place}, field '{found}': holds half of a character (a lone surrogate, such as \\ud83d), which no text "
            "can hold: mend it, or leave the row out"
        )
    return value, end


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"field {quoted(twice)} is given twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise UsageError(f"an integer of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=json_float, parse_int=_integer)


def _depth(value: Any) -> int:
    """Depth of nested objects and lists, without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            entry
            for inside in level
            if isinstance(inside, list | dict)
            for entry in (inside.values() if isinstance(inside, dict) else inside)
        ]
        depth += 1
    return depth - 1


def _half_character(value: Any, path: str) -> str | None:
    """Path of a text, or name, that holds a lone surrogate."""
    if isinstance(value, str):
        return path if _SURROGATE.search(value) else None
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        inside = f"{path}.{name}".removeprefix(".").encode(errors="backslashreplace").decode()
        found = inside if isinstance(name, str) and _SURROGATE.search(name) else _half_character(entry, inside)
        if found is not None:
            return found
    return None


def _csv(path: str, lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    end, header = 0, None
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num  # a quoted field may have lines
            if not cells or (header is not None and len(header) > 1 and cells[0].isspace() and len(cells) == 1):
                continue
            if header is None:
                header = _header(path, line, cells, delimiter)
                continue
            if len(cells) > len(header):
                raise UsageError(f"{path}, line {line}: more fields than the {len(header)} of the header")
            if len(cells) < len(header):
                raise UsageError(f"{path}, line {line}: the row ends before field '{header[len(cells)]}'")
            yield Record(f"{path}, line {line}", dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UsageError(f"{path}, line {end + 1}: {error}") from error


def _header(path: str, line: int, cells: list[str], delimiter: str) -> list[str]:
    others = [mark for mark in ";\t|," if len(cells) == 1 and mark in cells[0] and mark != delimiter]
    if others:
        raise UsageError(
            f"{path}, line {line}: the header {quoted(cells[0])} has no {delimiter!r}, but {others[0]!r}: part columns "
            "with commas in .csv, with tabs in .tsv"
        )
    _refuse_twice(f"{path}, line {line}", [cell for cell in cells if cell.strip()])
    if not any(cell.strip() for cell in cells):
        raise UsageError(f"{path}, line {line}: the header names no columns")
    return cells


def _refuse_twice(place: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UsageError(f"{place}: column {quoted(twice[0])} is there twice: rename one, or take it out")


def _json(path: str, lines: Iterator[str]) -> Iterator[Record]:
    first = True
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if first and text.lstrip().startswith("["):
            yield from _json_list(path, number, text + "".join(lines))
            return
        first = False
        yield Record(f"{path}, line {number}", parse_object(text, f"{path}, line {number}"))


def _json_list(path: str, line: int, text: str) -> Iterator[Record]:
    """The entries of a file that is one list of objects."""
    at, counted, mark = text.index("[") + 1, 0, ","
    if text.startswith("]", _after_space(text, at)):
        return
    while mark == ",":
        at = _after_space(text, at)
        line += text.count("\n", counted, at)
        counted, place = at, f"{path}, line {line}"
        value, at = parse_json(text, place, at, whole=False)
        if not isinstance(value, dict):
            raise UsageError(f"{place}: {quoted(value)} is no JSON object")
        yield Record(place, value)
        at = _after_space(text, at)
        mark, at = text[at : at + 1], at + 1
    if mark != "]" or text[at:].strip():
        line += text.count("\n", counted, at)
        raise UsageError(f"{path}, line {line}: the list of objects is cut off, or something else follows its entries")


def _parquet(path: str) -> Iterator[Record]:
    import pyarrow.parquet

    with open_table(path) as file:
        head = file.read(64)
    if not head:
        return
    if not head.startswith(b"PAR1"):
        check_content(path, head)
    rows = _guarded(path, _parquet_rows(path, pyarrow.parquet))
    yield from (Record(f"{path}, row {number}", fields) for number, fields in enumerate(rows, 1))


def _parquet_rows(path: str, parquet: Any) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(path) as file:
        _refuse_twice(path, list(file.schema_arrow.names))
        narrow = {field.name: convert for field in file.schema_arrow if (convert := _narrow(field.type)) is not None}
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                yield {**fields, **{name: convert(fields[name]) for name, convert in narrow.items()}}


def _narrow(kind: Any) -> Callable[[Any], Any] | None:
    """What makes the shortest decimal of narrow floats, 0.7 of float32 and not 0.699999988; None = there are none.

    Args:
        kind: An Arrow type.
    """
    import numpy
    from pyarrow import types

    if types.is_float16(kind) or types.is_float32(kind):
        number = numpy.float16 if types.is_float16(kind) else numpy.float32
        return lambda value: None if value is None else float(str(number(value)))
    if types.is_list(kind) or types.is_large_list(kind):
        entry = _narrow(kind.value_type)
        return entry and (lambda value: None if value is None else [entry(one) for one in value])
    if types.is_struct(kind):
        inside = {field.name: convert for field in kind if (convert := _narrow(field.type)) is not None}
        return (lambda value: value and {**value, **{n: f(value[n]) for n, f in inside.items()}}) if inside else None
    return None


def _guarded(path: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Rows of a reader of another package, whose errors get a place."""
    entries, number = iter(rows), 1
    while True:
        try:
            fields = next(entries)
        except StopIteration:
            return
        except UsageError:
            raise
        except Exception as error:  # of many kinds, for a damaged file
            raise UsageError(
                f"{path}, row {number} or later: the table is damaged or cannot be read "
                f"({type(error).__name__}: {str(error)[:200]}): get it again"
            ) from error
        yield fields
        number += 1


class Notices:
    """Counts rows by what is odd about them."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: str) -> None:
        """Notes one row.

        Args:
            what: What is odd about it.
            place: Where it stands.
        """
        self._places.setdefault(what, []).append(place)

    def warn(self, rows: int) -> None:
        """Warns of each oddity with the number of its rows, out of ``rows``, and the first of them."""
        for what, places in self._places.items():
            warnings.warn(f"{len(places)} of {rows} rows: {what} (first: {places[0]})", stacklevel=3)


def find(inside: Any, path: str) -> Any:
    """Returns what stands at a path, or None where there is nothing.

    Args:
        inside: An object, e.g. the fields of a record.
        path: Names and list positions joined by dots: ``ratings.quality``, ``turns.0``. ``*`` stands for every entry of
            a list: ``raters.*.score`` is a list of scores. A field whose own name has dots is found, too.
    """
    if isinstance(inside, Mapping) and path in inside:
        return inside[path]
    step, _, rest = path.partition(".")
    if isinstance(inside, list) and step == "*":
        return [find(entry, rest) if rest else entry for entry in inside]
    entry = None
    if isinstance(inside, list) and _is_position(step) and int(step) < len(inside):
        entry = inside[int(step)]
    elif isinstance(inside, Mapping):
        entry = inside.get(step)
    return find(entry, rest) if rest else entry


def _is_position(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10


def has_column(record: Record, path: str) -> bool:
    """Whether the table has the column in which a path starts; what it leads to may still be missing in a row."""
    return path in record.fields or path.partition(".")[0] in record.fields


def require(record: Record, path: str, argument: str) -> Any:
    """Like :func:`find`, for a column that must be there.

    Args:
        record: The row.
        path: The path.
        argument: Argument that named the column, for the error message.

    Raises:
        UsageError: The table has no such column.
    """
    if not has_column(record, path):
        raise UsageError(
            f"{record.place}: no field '{path}'; there are: {listed(record.fields)}. "
            f"Name the right one in `{argument}` of the Table"
        )
    return find(record.fields, path)
