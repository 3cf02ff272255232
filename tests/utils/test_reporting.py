import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure

from moslim.utils.files import (
    console_table,
    copy_report,
    log_pictures,
    markdown_table,
    metrics_table,
    number,
    plain,
    write_figures,
    write_texts,
)
from tests.helpers.offline_board import summaries


def test_plain():
    assert plain({"a": torch.tensor([0.1234567, -1e-9]), "b": (float("inf"), 3, "x", None, True)}) == {
        "a": [0.123457, 0.0],
        "b": [None, 3, "x", None, True],
    }
    assert str(plain(-1e-9)) == "0.0"


def test_numbers_as_text():
    assert [number(0.12345), number(-0.0001, 2), number(None)] == ["0.123", "0.00", "-"]


def test_a_cell_cannot_break_a_table():
    assert markdown_table(["a|b", "c"], [["x", "1"]]) == "| a&#124;b | c |\n| --- | ---: |\n| x | 1 |"


def test_a_table_for_the_console():
    long = "a_very_long_name_of_a_dimension_" * 4
    text = console_table("Title [x]", ["name", "x"], {"": [[long, "1"]], "before": [["[red]", "0.5"]]})
    title, header, _, first, heading, last = text.splitlines()
    assert [title, heading] == ["Title [x]", "before"]
    assert header == f"{'name':{len(long)}}     x"
    assert first == f"{long}     1"
    assert last == f"{'[red]':{len(long)}}   0.5"


def test_a_table_of_metrics_has_three_decimals():
    text = metrics_table("validate: metrics", {"val/spearman": torch.tensor(0.98765), "val/loss": 2})
    assert [line.split() for line in text.splitlines()[1:2] + text.splitlines()[3:]] == [
        ["metric", "value"],
        ["val/loss", "2.000"],
        ["val/spearman", "0.988"],
    ]


def test_files_are_whole_and_copied(tmp_path):
    paths = write_texts(tmp_path, "figures", {"a": 0.5}, "# Page\n") | write_figures(
        tmp_path, {"drawn": Figure(), "absent": None}
    )
    assert set(paths) == {"json", "report", "drawn"}
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())
    assert json.loads(paths["json"].read_text()) == {"a": 0.5}
    copies = copy_report(paths, tmp_path / "deep" / "copy")
    assert {name: path.read_bytes() for name, path in copies.items()} == {n: p.read_bytes() for n, p in paths.items()}


def test_a_result_that_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_texts(tmp_path, "figures", {"a": float("nan")}, "page")
    assert not list(tmp_path.iterdir())


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    class Board(CSVLogger):
        taken = []

        def log_image(self, key, images, step):
            self.taken.append((key, images, step))

    paths = {"json": tmp_path / "a.json", "map": tmp_path / "map.png"}
    log_pictures([CSVLogger(tmp_path), Board(tmp_path)], paths, "test", 3)
    assert Board.taken == [("test/map", [str(tmp_path / "map.png")], 3)]


def test_pictures_go_to_tensorboard(tmp_path):
    board = TensorBoardLogger(tmp_path)
    log_pictures([board], write_figures(tmp_path, {"map": Figure(figsize=(3, 2), dpi=100)}), "test", 3)
    board.finalize("success")
    (file,) = tmp_path.rglob("events.out.*")
    found = {value.tag: (step, value.image.width, value.image.height) for step, value in summaries(file)}
    assert found["test/map"] == (3, 300, 200)
