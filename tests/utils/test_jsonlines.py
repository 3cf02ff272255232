"""A file of records whose writer was interrupted."""

import warnings
from pathlib import Path

import pytest

from moslim.utils.files import JsonLines, unfinished

NOTE = {"weights": "abc"}


def interrupted(folder: Path) -> Path:
    path = folder / "scores.jsonl"
    JsonLines(path, NOTE).write([{"row": 0}, {"row": 1}])
    return path


def test_whole_records_are_found_again(tmp_path: Path) -> None:
    path = interrupted(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert list(unfinished(path, NOTE)) == [{"row": 0}, {"row": 1}]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'"weights"', b"\xff\xfe{", b"[" * 100_000, b"{} {}"])
def test_a_damaged_note_begins_anew(tmp_path: Path, content: bytes) -> None:
    path = interrupted(tmp_path)
    (tmp_path / "scores.jsonl.part.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"scores.jsonl.part.json, which says .* is damaged: starting anew"):
        assert list(unfinished(path, NOTE)) == []


@pytest.mark.parametrize("line", [b"[1]\n", b"5\n", b'{"row": \n', b"\x00\x00\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_record_ends_what_is_whole(tmp_path: Path, line: bytes) -> None:
    path = interrupted(tmp_path)
    with (tmp_path / "scores.jsonl.part").open("ab") as part:
        part.write(line + b'{"row": 3}\n')
    assert list(unfinished(path, NOTE)) == [{"row": 0}, {"row": 1}]
