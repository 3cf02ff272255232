import pytest

from moslim.utils.files import whole_file, write_bytes, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "früher\n")
    assert path.read_bytes() == "früher\n".encode()
    with whole_file(path) as part:
        part.write_bytes(b"now")
        assert path.read_bytes() == "früher\n".encode() and part.parent == path.parent
    assert path.read_bytes() == b"now" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.md"
    write_bytes(path, b"before")
    with pytest.raises(OSError, match="disk"), whole_file(path) as part:
        part.write_bytes(b"half")
        raise OSError("disk")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
