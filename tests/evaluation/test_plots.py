import io
import math

import numpy as np
import pytest
from PIL import Image

from moslim.evaluation import plotting as plots
from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.steerability import steerability


@pytest.fixture
def result(trained, starting, preferences):
    return steerability(trained, starting, preferences, JudgeInfo("gold", proxy=False), {})


def pixels(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.slow
def test_one_panel_per_dimension_with_the_means(result):
    figure = plots.requested_against_achieved(result)
    warmth, length = figure.axes
    assert (warmth.get_title(loc="left"), length.get_title(loc="left")) == ("warmth", "length")
    lines = {line.get_label(): list(line.get_ydata()) for line in warmth.lines}
    assert lines == {"ideal": [0, 1, 2], "before": [1.0, 1.0, 1.0], "trained": [0.5, 1.0, 1.5]}
    assert [label.get_text() for label in warmth.get_xticklabels()] == ["cold", "neutral", "warm"]
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 50


def test_a_proxy_judge_is_named_in_the_title(result):
    result["judge"] = {"name": "classifier", "proxy": True}
    assert plots.cross_talk(result).get_suptitle() == "Cross-talk, classifier judge (proxy)"


def test_cross_talk_writes_every_number(result):
    result["cross_talk"] = [[1.5, -0.004], [None, -0.25]]
    figure = plots.cross_talk(result)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.50", "0.00", "-", "-0.25"]
    assert figure.axes[0].images[0].get_clim() == (-1.5, 1.5)
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 50


def test_what_was_not_measured_is_left_blank(result):
    for curve in result["curves"].values():
        curve["policy"] = [None] * len(curve["policy"])
    result["dimensions"]["warmth"]["spearman"] = None
    figure = plots.requested_against_achieved(result)
    assert figure.axes[0].texts[0].get_text().startswith("Spearman -")
    assert pixels(figure).size


def test_learning_curves_from_metrics_csv(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(
        "step,train/proxy,train/gold,train/proxy/warmth,train/loss\n0,0.2,0.1,0.3,\n1,,,,5.0\n2,0.6,0.5,nan,\n"
    )
    history = plots.read_history(file)
    assert history[1] == {"step": 1.0, "train/loss": 5.0}
    assert math.isnan(history[2]["train/proxy/warmth"])
    figure = plots.learning_curves(history, ["warmth", "length"])
    mean, warmth = figure.axes
    faint_and_smooth = [(list(line.get_xdata()), list(line.get_ydata())) for line in mean.lines]
    assert faint_and_smooth == [([0, 2], [0.2, 0.6])] * 2 + [([0, 2], [0.1, 0.5])] * 2
    assert [list(line.get_ydata()) for line in warmth.lines] == [[0.3], [0.3]]
    assert pixels(figure).size


def test_no_learning_curves_without_their_columns():
    assert plots.learning_curves([{"step": 0.0, "train/loss": 1.0}], ["warmth"]) is None


def test_smooth():
    assert plots.smooth([1.0, 2.0, 6.0], share=0.1) == [1.0, 2.0, 6.0]
    assert plots.smooth([0.0, 3.0, 6.0, 0.0], share=0.5) == [1.5, 3.0, 3.0, 3.0]
