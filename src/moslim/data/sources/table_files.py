"""Table files: resolves names and patterns to files, and reads text files line by line."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moslim.utils.errors import MissingFileError, UsageError, listed

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of table files."""
_OPENERS: dict[str, Callable[[str, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zip": open}
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), "save the sheet as CSV (UTF-8)"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".dta", ".sav"), "convert it to parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npz", ".db", ".sqlite"), "write its rows as JSON Lines"),
    **dict.fromkeys((".zst", ".7z", ".rar", ".tar", ".tgz"), "unpack it"),
    **dict.fromkeys((".txt", ".dat", ".data", ".xml", ".html", ".yaml", ".yml"), "write its rows as JSON Lines or CSV"),
}
"""Remedy by suffix for files that are not supported."""
_BOMS = (  # UTF-32 first: its mark begins with the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file: give it the ending .gz",
    b"BZh": "a bzip2 file: give it the ending .bz2",
    b"\xfd7zXZ": "an xz file: give it the ending .xz",
    b"PK\x03\x04": "a zip archive or a spreadsheet: give it the ending .zip, or save the sheet as CSV (UTF-8)",
    b"PAR1": "a parquet file: give it the ending .parquet",
    b"version https://git-lfs": "a pointer of Git LFS, which stands for the file: get the file with `git lfs pull`",
}
"""Description by first bytes of files that are not text."""
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, NotImplementedError)
"""Errors raised by compressed files that are damaged, truncated or locked."""


def is_file_name(name: str) -> bool:
    """Whether a name is, or looks like, a table file rather than a Hub data set or one of its splits."""
    if Path(name).is_dir():
        return False
    path = Path(name.lower())
    has_known_suffix = {*SUFFIXES, *_OPENERS, *_REMEDIES} & {path.suffix, _named_suffix(name)}
    if has_known_suffix or re.search(r"[*?\\]|://|^[/~.]", name) or name.count("/") > 1:
        return True
    if "/" in name and not path.suffix:  # OWNER/NAME of the Hub, even if a folder OWNER exists
        return Path(name).is_file()
    if "/" in name:
        return Path(name).is_file() or Path(name).parent.is_dir()
    return re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", path.suffix) is not None


def table_files(name: str) -> list[str]:
    """Returns the sorted files that match a name or a pattern such as ``part-*.parquet``.

    Raises:
        MissingFileError: No file matches.
        UsageError: A file has an unsupported format.
    """
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    if "://" in name:
        raise UsageError(f"data.source: '{name}' is an address: download the file and name its path")
    files = (
        [path]
        if Path(path).is_file()
        else sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    )
    if not files:
        matches = "no file matches" if glob.has_magic(path) else "there is no file"
        raise MissingFileError(f"data.source: {matches} '{name}' (looked in {Path.cwd()})")
    for file in files:
        _check_suffix(file)
    return files


def _check_suffix(file: str) -> None:
    suffix, outer_suffix = _named_suffix(file), Path(file.lower()).suffix
    compressed = outer_suffix in _OPENERS
    if compressed and suffix == ".parquet":
        raise UsageError(f"{file}: parquet is compressed already: unpack the file, and name the .parquet in it")
    if suffix in SUFFIXES or (compressed and file.lower().endswith(".zip")):
        return
    remedy = _REMEDIES.get(outer_suffix) or _REMEDIES.get(suffix) or "convert it, or give it the right ending"
    raise UsageError(
        f"{file}: a {outer_suffix or 'file without an ending'} is not read: {remedy}; tables are {', '.join(SUFFIXES)} "
        f"(text also as {', '.join(_OPENERS)})"
    )


def open_table(path: str) -> IO[bytes]:
    """Opens a table file for reading bytes, decompressed if needed."""
    suffix = Path(path.lower()).suffix
    if suffix == ".zip":
        return zipfile.ZipFile(path).open(_member(path))
    file: IO[bytes] = _OPENERS.get(suffix, open)(path, "rb")
    return file


def table_suffix(path: str) -> str:
    """Returns the suffix of an existing table file without compression, e.g. ``.csv`` for ``rows.csv.gz``.

    Raises:
        UsageError: A zip archive is damaged, or does not hold exactly one table.
    """
    return Path(_member(path).lower()).suffix if path.lower().endswith(".zip") else _named_suffix(path)


def _named_suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _member(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not re.search(r"/$|^__MACOSX/|(^|/)\.[^/]*$", name)]
    except DAMAGED as error:
        raise UsageError(f"{path}: the archive cannot be read ({error}): get it again") from error
    if len(names) != 1 or Path(names[0].lower()).suffix not in SUFFIXES[:-1]:
        raise UsageError(f"{path}: holds {listed(names) or 'no file'}: unpack it, and name the table")
    return names[0]


def read_lines(path: str, encoding: str | None) -> Iterator[str]:
    """Yields the lines of a text file with their line ends.

    Args:
        path: The file, possibly compressed.
        encoding: Its encoding; None = that of its byte order mark, else UTF-8.

    Raises:
        UsageError: The file is damaged or not in this encoding; the message names file and line.
    """
    line, actual_encoding = 0, "utf-8"
    try:
        with open_table(path) as opened:
            actual_encoding = _encoding(path, opened.read(4096), encoding)
        with io.TextIOWrapper(open_table(path), actual_encoding, newline="") as file:
            for text in file:
                line += 1
                yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1].hex()
        remedy = "give another `encoding`" if encoding else "save it as UTF-8, or give a Table its `encoding`: cp1252"
        raise UsageError(
            f"{path}, line {_undecodable_line(path, actual_encoding)}: not {encoding or actual_encoding} text "
            f"(byte 0x{byte}: {error.reason}): {remedy}"
        ) from None
    except DAMAGED as error:
        raise UsageError(
            f"{path}, line {line + 1} or later: the file is damaged, cut off or locked "
            f"({str(error)[:200] or type(error).__name__}): get it again"
        ) from error


def check_content(path: str, head: bytes) -> None:
    """Raises an error if a file has another format than its suffix says.

    Args:
        path: The file.
        head: Its first bytes, decompressed.

    Raises:
        UsageError: The file is compressed, a parquet file, or a pointer of Git LFS.
    """
    description = next((text for mark, text in _OTHER_FORMATS.items() if head.startswith(mark)), None)
    if description is not None:
        raise UsageError(f"{path}, line 1: is {description}")


def _undecodable_line(path: str, encoding: str) -> int:
    """Number of the first line that cannot be decoded; the error of a text stream refers to its buffer only."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with open_table(path) as file:
        while chunk := file.read(1 << 16):
            state = decoder.getstate()
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeDecodeError as error:
                decoder.setstate(state)
                valid = len(chunk) - (len(error.object) - error.start)  # error.object begins with the last chunk's rest
                return line + (decoder.decode(chunk[:valid]).count("\n") if valid > 0 else 0)
    return line


def _encoding(path: str, head: bytes, encoding: str | None) -> str:
    check_content(path, head)
    bom_encoding = next((name for mark, name in _BOMS if head.startswith(mark)), None)
    if encoding is None:
        if bom_encoding is None and b"\0" in head:
            raise UsageError(
                f"{path}, line 1: holds zero bytes, so it is no UTF-8 text: save it as UTF-8, or give the Table "
                "`encoding`, e.g. utf-16-le"
            )
        return bom_encoding or "utf-8"
    try:
        name = codecs.lookup(encoding).name
        io.TextIOWrapper(io.BytesIO(), encoding)  # raises for encodings that are not text
    except LookupError:
        raise UsageError(f"data.source.encoding: '{encoding}' is no encoding; give e.g. cp1252 or utf-16") from None
    if bom_encoding is not None and not name.startswith(bom_encoding.removesuffix("-sig")):
        raise UsageError(
            f"{path}, line 1: begins with the mark of {bom_encoding}, not of {encoding}: leave out `encoding`"
        )
    return bom_encoding or name
