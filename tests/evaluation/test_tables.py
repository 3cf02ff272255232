import pytest

from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.steerability import steerability
from moslim.evaluation.steerability_report import markdown, summary_table
from moslim.preferences import PreferenceSet


def build(trained, starting, preferences, proxy=False):
    return steerability(trained, starting, preferences, JudgeInfo("j", proxy), {"seed": 5})


@pytest.fixture
def result(trained, starting, preferences):
    return build(trained, starting, preferences)


def test_markdown_tables(result):
    page = markdown(result, ["a_b.png"])
    for line in (
        "2 held-out questions, 14 answers, judge: `j`.",
        "| warmth | 0.500 (0.000) | 0.667 (0.333) | 1.000 (1.000) | 0.333 (0.667) | 1.000 (1.000) | 1.000 (0.000) |",
        "| **mean** | 0.250 (0.000) | 0.583 (0.417) | 1.000 (1.000) | 0.417 (0.583) | 0.750 (1.000) | 0.500 (0.000) |",
        "| seen | 0.500 (0.000) | 0.500 (1.000) |",
        "| warmth | 0.333 | 0.600 | 0.333 | 0.667 |",
        "| length | 0.000 | 0.500 | 0.500 |",
        "| **length** | -0.500 | 0.000 |",
        "![a b](a_b.png)",
        '  "seed": 5',
    ):
        assert line in page.splitlines()
    assert "| unseen |" not in page
    assert "0.000 before training, -0.058 after training" in page


def test_proxy_is_marked_wherever_a_judge_speaks(trained, starting, preferences):
    page = markdown(build(trained, starting, preferences, proxy=True))
    assert "> **Proxy.**" in page
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert [h for h in headings if not h.endswith("(proxy)")] == ["## Settings"]
    assert "judge: j (proxy)" in summary_table(build(trained, starting, preferences, proxy=True))
    assert "roxy)" not in markdown(build(trained, starting, preferences)).replace("(proxy minus gold)", "")


def test_no_combinations(trained, starting, preferences):
    page = markdown(build(trained.of_kind("sweep"), starting.of_kind("sweep"), preferences))
    assert "No prompt requests several dimensions." in page
    assert "| warmth | - | - | - |" in page  # nothing was asked without an instruction


def test_a_name_cannot_break_a_table(trained, starting):
    preferences = PreferenceSet({"a|b": ["low", "mid", "high"], "c [red] d": ["low", "high"]})
    result = build(trained, starting, preferences)
    assert "| a&#124;b | 0.500 (0.000)" in markdown(result)
    assert "c [red] d" in summary_table(result)


def test_summary_fits_the_console(result):
    text = summary_table(result)
    assert max(map(len, text.splitlines())) <= 80
    trained, before = [line.split() for line in text.splitlines() if line.split()[:1] == ["warmth"]]
    assert trained[1:3] == ["0.500", "0.667"]
    assert before[1:3] == ["0.000", "0.333"]
    assert text.index("before training") > text.index("warmth")
    assert "proxy minus gold: -0.058" in text


def test_a_classifier_that_judges_is_not_called_gold(result):
    judged = {**result, "judge": {**result["judge"], "proxy": True}}
    assert "proxy minus share of requests met by the classifier judge: -0.058" in summary_table(judged)
