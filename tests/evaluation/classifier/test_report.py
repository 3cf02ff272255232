import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moslim.evaluation import plotting as plots
from moslim.evaluation.classifier_records import ScoredComparisons, ScoredRows
from moslim.evaluation.classifier_report import evaluate, markdown, scalars, summary_table, write_report
from moslim.utils.files import Result
from tests.helpers.scored_rows import PREFERENCES

BEST_OF = {
    "mapping": "ExpectedDistance",
    "n_prompts": 3,
    "n_answers": 4,
    "chance": 0.25,
    "accuracy": 0.75,
    "interval": [0.5, 1.0],
    "paraphrases": {"n": 6, "accuracy": 0.5, "every": 0.25},
}


@pytest.fixture
def result(six: ScoredRows) -> Result:
    pairs = ScoredComparisons(torch.tensor([[1.0, -1.0]]).double(), torch.ones(1, 2).bool(), torch.tensor([9]), ["en"])
    six.raw = six.probs.sqrt() / six.probs.sqrt().sum(-1, keepdim=True)
    six.requested[:, 1] = 2
    return evaluate(six, pairs, PREFERENCES, {"two": 2.0, "three": 0.5}, BEST_OF)


@pytest.fixture
def least(six: ScoredRows, no_comparisons: ScoredComparisons) -> Result:
    """One unlabelled dimension, no subsets, pairs or prompts."""
    rows = six.select(six.length > 100)
    return evaluate(rows, no_comparisons, PREFERENCES)


def colours(figure) -> int:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(np.unique(np.asarray(Image.open(buffer).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.slow
def test_confusion_matrices_show_shares_and_counts(result: Result) -> None:
    figure = plots.confusion_matrices(result)
    two, three = figure.axes
    assert [text.get_text() for text in three.texts][:3] == ["0.50\n1", "0.50\n1", "0.00\n0"]
    assert np.asarray(three.images[0].get_array()).tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0.5, 0, 0.5]]
    assert [label.get_text() for label in two.get_yticklabels()] == ["no", "yes"]
    assert two.get_title(loc="left") == "two   accuracy 0.60"
    assert colours(figure) > 50


@pytest.mark.slow
def test_reliability_diagram_has_both_curves_and_the_diagonal(result: Result) -> None:
    figure = plots.reliability(result["calibration"])
    assert figure is not None
    three = figure.axes[1]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in three.lines}
    assert lines["perfect"] == ([0, 1], [0, 1])
    assert lines["classifier"] == ([0.8], [pytest.approx(4 / 6, abs=1e-6)])
    assert "without temperature" in lines
    assert three.get_title(loc="left") == f"three   ECE {0.8 - 4 / 6:.3f}"
    assert colours(figure) > 50
    assert plots.reliability({"two": None}) is None


@pytest.mark.slow
def test_correlation_of_heads_beside_labels(result: Result) -> None:
    figure = plots.head_correlation(result)
    assert figure is not None
    labels = figure.axes[1]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["heads", "labels"]
    assert float(labels.texts[1].get_text()) == round(result["correlation"]["label"][0][1], 2)
    assert colours(figure) > 50
    assert plots.head_correlation({"correlation": None}) is None


def test_the_page_tells_every_figure(result: Result) -> None:
    page = markdown(result, ["confusion.png"])
    for line in (
        "6 labelled answers, 4 questions.",
        "| three | 6 | 0.667 | 0.667 | 0.833 | 0.500 | 0.286 | 0.258 | 0.656 | - |",
        "![confusion](confusion.png)",
        "| three | 1 b | 2 | 3 | 1.000 |",
        "| de | two | 1 | 0.000 |",
        "| 1 to 2 | 2 | 0.500 | 0.500 |",
        "weighted sum of expected levels: two 2, three 0.5.",
        "| **weighted sum** | 1 | 1.000 |",
        "| three | 6 | 0.217 | 0.333 | -0.117 [",
        "| two | 0 | - | - | - |",
        "## Best of 4",
        "| original questions | 0.750 [0.500, 1.000] |",
        "| original question and all its paraphrases | 0.250 |",
        f"| three | {0.8 - 4 / 6:.3f} (",
    ):
        assert line in page, line
    assert "nan" not in page and "None" not in page


def test_what_there_is_not_takes_no_space(least: Result) -> None:
    page = markdown(least)
    for heading in ("By subset", "Comparisons", "Answers to requests", "Best of"):
        assert heading not in page
    assert "| three | 0 | - | - | - | - | - | - | - | - |" in page
    assert "nan" not in page and "None" not in page


def test_a_folder_with_everything(result: Result, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    paths = write_report(result, folder)
    assert set(paths) == {"json", "report", "confusion", "correlation", "reliability"}
    assert sorted(folder.iterdir()) == sorted(paths.values())
    assert paths["json"].name == "reward.json" and json.loads(paths["json"].read_text()) == result
    for name in ("confusion", "correlation", "reliability"):
        assert f"({name}.png)" in paths["report"].read_text()
        with Image.open(paths[name]) as image:
            assert image.format == "PNG" and min(image.size) > 300


def test_an_empty_test_is_written_too(least: Result, tmp_path: Path) -> None:
    assert set(write_report(least, tmp_path)) == {"json", "report", "confusion", "correlation"}
    assert scalars(least) == {}


def test_scalars(result: Result) -> None:
    found = scalars(result)
    assert found["three/kappa"] == result["dimensions"]["three"]["kappa"]
    assert found["mean/accuracy"] == result["mean"]["accuracy"]
    assert found["en/three/within_one"] == 1
    assert "en/three/macro_f1" not in found and "three/auroc" not in found
    assert found["pairs/two/accuracy"] == 1 and found["pairs/three/accuracy"] == 0
    assert found["pairs/weighted/accuracy"] == 1
    kinds = ("proxy", "gold", "gap")
    assert [found[f"requests/three/{kind}"] for kind in kinds] == pytest.approx([1.3 / 6, 2 / 6, -0.7 / 6], abs=1e-6)
    assert found["requests/mean/gap"] == found["requests/three/gap"] and "requests/two/gap" not in found
    assert (found["best_of/accuracy"], found["best_of/paraphrased"], found["best_of/every_paraphrase"]) == (
        0.75,
        0.5,
        0.25,
    )
    assert found["calibration/two/rps"] == result["calibration"]["two"]["rps"]


def test_the_summary_fits_a_console_of_80_columns(result: Result) -> None:
    lines = summary_table(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Reward classifier, 6 labelled answers, 4 questions"
    assert lines[1].split() == "dimension rows accuracy within one MAE kappa Spearman AUROC".split()
    assert [line.split()[:3] for line in lines[3:5]] == [["two", "5", "0.600"], ["three", "6", "0.667"]]
    assert lines[5].split()[:2] == ["mean", "0.633"]
    assert lines[6:] == [
        "comparisons: accuracy 1.000 of the weighted sum of expected levels",
        "answers to requests: proxy 0.217, gold 0.333",
        "best of 4: accuracy 0.750, chance 0.250",
    ]


def test_the_summary_of_a_test_without_labels(least: Result) -> None:
    lines = summary_table(least).splitlines()
    assert lines[3].split() == ["two", "0", *["-"] * 6]
    assert lines[-1].split() == ["mean", *["-"] * 6]
