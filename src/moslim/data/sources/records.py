"""Reading of tables row by row, with the place of each row, and access to nested fields of a row."""

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
"""Maximum nesting of objects and lists."""
_LONGEST_INTEGER = 4000
_LONGEST_FIELD = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s*")


@dataclass
class Record:
    """One row of a table.

    Args:
        place: File and line, e.g. ``ratings.csv, line 7``.
        fields: Values by column name. A JSON object may omit some; :func:`completed` adds them.
    """

    place: str
    fields: dict[str, Any]


def scan_file(name: str, encoding: str | None = None) -> Iterator[Record]:
    """Reads CSV, TSV, JSON Lines, JSON or parquet files row by row.

    Text may be compressed (``.gz``, ``.bz2``, ``.xz``, or a ``.zip`` with one table).

    Args:
        name: File, or a pattern such as ``part-*.parquet``, whose files are read in alphabetical order.
        encoding: Encoding of text files; None = that of the byte order mark, else UTF-8.

    Yields:
        The rows.

    Raises:
        MissingFileError: There is no such file.
        UsageError: A line cannot be read (the message names file and line), or the table has no rows.
    """
    files, first_columns, count = table_files(name), None, 0
    for file in files:
        for position, record in enumerate(_scan(file, encoding)):
            if position == 0 and len(files) > 1 and table_suffix(file) in (".csv", ".tsv", ".parquet"):
                first_columns = first_columns or (file, set(record.fields))
                if first_columns[1] != set(record.fields):
                    raise UsageError(
                        f"{record.place}: other columns than in {first_columns[0]}: "
                        f"{listed(sorted(first_columns[1] ^ set(record.fields)))}; "
                        f"the files of '{name}' must be one table"
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
    """Returns all rows of :func:`scan_file`, each with the columns of all."""
    return completed(scan_file(path))


def scan_hub(name: str, split: str, folder: str | None = None, config_name: str | None = None) -> Iterator[Record]:
    """Reads a split of a Hub data set, or of a local folder in the layout of the Hub, row by row.

    Args:
        name: Name of the data set.
        split: Name of the split.
        folder: Folder of the data set to read; None = all.
        config_name: Configuration of the data set; None = the default.

    Yields:
        The rows.

    Raises:
        MissingFileError: The data set cannot be read.
        UsageError: The split has no rows.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config_name, data_dir=folder, split=split)
    except Exception as error:  # network, access, no such split, damaged files
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
    """Returns the records with the columns of all; a column that a record omits is None."""
    rows = list(records)
    columns = {column: None for record in rows for column in record.fields}
    return [Record(record.place, {**columns, **record.fields}) for record in rows]


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        UsageError: The text is no JSON object, or holds a repeated name, a lone surrogate, an integer of thousands of
            digits, or more than a hundred levels of nesting.
    """
    if not text.strip():
        raise UsageError(f"{place}: is empty, and should hold a JSON object")
    value = parse_json(text, place)[0]
    if not isinstance(value, dict):
        raise UsageError(f"{place}: {quoted(text.strip())} is no JSON object; write one object per line")
    return value


def parse_json(text: str, place: str, start: int = 0, whole: bool = True) -> tuple[Any, int]:
    """Parses the JSON value at a position of a text.

    Args:
        text: The text.
        place: File and line of the text, for error messages.
        start: Position of the value.
        whole: Whether the value must be the last thing in the text.

    Returns:
        The value and its end position.

    Raises:
        UsageError: There is no valid value; see :func:`parse_object`.
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
    if text.find("\\u", start, end) >= 0 and (path := _lone_surrogate(value, "")) is not None:
        raise UsageError(
            f"{place}, field '{path}': holds half of a character (a lone surrogate, such as \\ud83d), which no text "
            "can hold: mend it, or leave the row out"
        )
    return value, end


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        names = [name for name, _ in items]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"field {quoted(repeated)} is given twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise UsageError(f"an integer of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=json_float, parse_int=_integer)


def _depth(value: Any) -> int:
    """Depth of nested objects and lists, computed without recursion."""
    depth, values = 0, [value]
    while values:
        values = [
            entry
            for container in values
            if isinstance(container, list | dict)
            for entry in (container.values() if isinstance(container, dict) else container)
        ]
        depth += 1
    return depth - 1


def _lone_surrogate(value: Any, path: str) -> str | None:
    """Path of the first text or name with a lone surrogate; None if there is none."""
    if isinstance(value, str):
        return path if _SURROGATE.search(value) else None
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        entry_path = f"{path}.{name}".removeprefix(".").encode(errors="backslashreplace").decode()
        if isinstance(name, str) and _SURROGATE.search(name):
            return entry_path
        if (surrogate_path := _lone_surrogate(entry, entry_path)) is not None:
            return surrogate_path
    return None


def _csv(path: str, lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    end, header = 0, None
    try:
        for cells in reader:
            line, end = end + 1, reader.line_num  # a quoted field may span lines
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
    _check_unique(f"{path}, line {line}", [cell for cell in cells if cell.strip()])
    if not any(cell.strip() for cell in cells):
        raise UsageError(f"{path}, line {line}: the header names no columns")
    return cells


def _check_unique(place: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UsageError(f"{place}: column {quoted(repeated[0])} is there twice: rename one, or take it out")


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
    """Yields the entries of a file that is one list of objects."""
    position, counted, separator = text.index("[") + 1, 0, ","  # lines are counted up to `counted`
    if text.startswith("]", _after_space(text, position)):
        return
    while separator == ",":
        position = _after_space(text, position)
        line += text.count("\n", counted, position)
        counted, place = position, f"{path}, line {line}"
        value, position = parse_json(text, place, position, whole=False)
        if not isinstance(value, dict):
            raise UsageError(f"{place}: {quoted(value)} is no JSON object")
        yield Record(place, value)
        position = _after_space(text, position)
        separator, position = text[position : position + 1], position + 1
    if separator != "]" or text[position:].strip():
        line += text.count("\n", counted, position)
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
        _check_unique(path, list(file.schema_arrow.names))
        converters = {
            field.name: convert for field in file.schema_arrow if (convert := _float_converter(field.type)) is not None
        }
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                yield {**fields, **{name: convert(fields[name]) for name, convert in converters.items()}}


def _float_converter(arrow_type: Any) -> Callable[[Any], Any] | None:
    """Function that converts float16 and float32 to their shortest decimals, 0.7 rather than 0.699999988.

    Args:
        arrow_type: Arrow type of the values.

    Returns:
        The function, or None if the type contains no such floats.
    """
    import numpy
    from pyarrow import types

    if types.is_float16(arrow_type) or types.is_float32(arrow_type):
        number = numpy.float16 if types.is_float16(arrow_type) else numpy.float32
        return lambda value: None if value is None else float(str(number(value)))
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        of_entry = _float_converter(arrow_type.value_type)
        return of_entry and (lambda value: None if value is None else [of_entry(entry) for entry in value])
    if types.is_struct(arrow_type):
        of_fields = {
            field.name: convert for field in arrow_type if (convert := _float_converter(field.type)) is not None
        }
        if not of_fields:
            return None
        return lambda value: value and {**value, **{name: f(value[name]) for name, f in of_fields.items()}}
    return None


def _guarded(path: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Yields rows from a reader of another package; its errors become UsageErrors with the row."""
    entries, number = iter(rows), 1
    while True:
        try:
            fields = next(entries)
        except StopIteration:
            return
        except UsageError:
            raise
        except Exception as error:  # readers raise many types for a damaged file
            raise UsageError(
                f"{path}, row {number} or later: the table is damaged or cannot be read "
                f"({type(error).__name__}: {str(error)[:200]}): get it again"
            ) from error
        yield fields
        number += 1


class Notices:
    """Warnings about rows, issued once per table with the number of rows."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, message: str, place: str) -> None:
        """Adds a row.

        Args:
            message: Text of the warning.
            place: File and line of the row.
        """
        self._places.setdefault(message, []).append(place)

    def warn(self, rows: int) -> None:
        """Issues a warning per message, with the number of its rows out of ``rows`` and the first place."""
        for message, places in self._places.items():
            warnings.warn(f"{len(places)} of {rows} rows: {message} (first: {places[0]})", stacklevel=3)


def find(container: Any, path: str) -> Any:
    """Returns the value at a path, or None if there is none.

    Args:
        container: An object, e.g. the fields of a record.
        path: Names and list positions joined by dots: ``ratings.quality``, ``turns.0``. ``*`` stands for every entry of
            a list: ``raters.*.score`` is a list of scores. A field name with dots is matched, too.
    """
    if isinstance(container, Mapping) and path in container:
        return container[path]
    step, _, rest = path.partition(".")
    if isinstance(container, list) and step == "*":
        return [find(entry, rest) if rest else entry for entry in container]
    entry = None
    if isinstance(container, list) and _is_position(step) and int(step) < len(container):
        entry = container[int(step)]
    elif isinstance(container, Mapping):
        entry = container.get(step)
    return find(entry, rest) if rest else entry


def _is_position(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10


def has_column(record: Record, path: str) -> bool:
    """Whether the table has the column at the start of a path; the value at the path may still be missing."""
    return path in record.fields or path.partition(".")[0] in record.fields


def require(record: Record, path: str, argument: str) -> Any:
    """Returns the value at a path, see :func:`find`, of a column that must exist.

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
