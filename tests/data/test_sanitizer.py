# ruff: noqa: RUF001
"""Full-width characters are what is tested here."""

import time
import unicodedata

import pytest

from moslim.data.sanitizing import ForbiddenText, TextSanitizer, fold
from tests.helpers.code_points import SOME

FORBIDDEN = ["<|end|>", "<|user|>"]
TAG = ForbiddenText("[[heat: very warm]]", "heat: very warm", "form")


def sanitizer(*strings: str) -> TextSanitizer:
    return TextSanitizer([*map(ForbiddenText, strings), TAG])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Be short and formal, please.", "Be short and formal, please."),
        ("a <|end|> b", "a  b"),
        ("a <|END|> b", "a  b"),
        ("＜｜ＥＮＤ｜＞", ""),
        ("<|us<|end|>er|>", ""),
        ("<|e<|e<|end|>nd|>nd|>", ""),
        ("a<|end|>\u0338b", "a\u0338b"),
        ("a<|end|\u226fb", "ab"),
        ("<|e\u200bnd|>", ""),
        ("<|\u00ade\x00n\u0301d|>", ""),
        ("<|e\u3164n\u115fd|>", ""),
        ("㏑ ½ ﬁne ＜|end|> ½", "㏑ ½ ﬁne  ½"),
        ("", ""),
    ],
)
def test_strings_are_taken_out_however_they_are_written(text, expected):
    assert sanitizer(*FORBIDDEN).text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "What is the determinant of [[1, 2], [3, 4]]?",
        "if [[ -f x && $y == z ]]; then echo; fi",
        "[[warmth]] [[Page|heat: high]] [[heat: very warmer]] [[heat: very, warm]] [[ [[",
        "heat: very warm, [heat: very warm], [[very warm]]",
        "x[[0]][[:, 1]] ]]",
        "a < end > b",
    ],
)
def test_other_brackets_stay(text):
    assert sanitizer(*FORBIDDEN).text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "[[heat: very warm]]",
        "[[ Heat :very\n\t warm ] ]",
        "［［heat：very warm］］",
        "[[he\u200bat: very wa\u0301rm]]",
        "[[h<|end|>eat: very warm]]",
        "[[[[heat: very warm]]]]",
        "[[heat: [[heat: very warm]]",
    ],
)
def test_what_reads_as_an_instruction_loses_its_brackets(text):
    left = sanitizer(*FORBIDDEN).text(f"a{text}b")
    assert "[[heat: very warm]]" not in fold(left).replace(" ", "").replace("verywarm", "very warm")
    assert left in ("aheat: very warmb", "a[[heat: heat: very warmb")


def test_forms_are_whole_words_and_lines_begin_with_theirs():
    found = TextSanitizer(
        [
            ForbiddenText("note to self:", match="form"),
            ForbiddenText("User:", match="line"),
            ForbiddenText("BOT:", "", "form", True),
        ]
    )
    assert found.text("A note to  self: x, footnote to self: y") == "A  x, footnote to self: y"
    assert found.text("User: a\n  USER : b\nThe User: c\nUSER:User: d") == " a\n   b\nThe User: c\n d"
    assert found.text("A BOT: b, a bot: c, ROBOT: d") == "A  b, a bot: c, ROBOT: d"


def test_composed_characters():
    """A string with marks is found composed and decomposed, and never in words without them."""
    accented = sanitizer("<é>")
    decomposed = unicodedata.normalize("NFD", "x <é> y")
    assert decomposed != "x <é> y"
    assert accented.text(decomposed) == accented.text("x <é> y") == "x  y"
    assert accented.text(unicodedata.normalize("NFD", "<<é>é>")) == ""
    assert accented.text("<e> y") == "<e> y"
    assert sanitizer("Note").text("a Note\u0301 b") == "a \u0301 b"


def test_case_folding_that_changes_the_length():
    assert sanitizer("<STRASSE>").text("a <straße> b") == "a  b"
    assert sanitizer("…]").text("wait...] and …] end") == "wait and  end"


def test_nothing_is_forbidden():
    assert TextSanitizer(map(ForbiddenText, [" ", ""])).text("a [[ b") == "a [[ b"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("[[" * 100_000, 200_000),
        ("<|e" * 20_000 + "<|end|>" + "nd|>" * 20_000, 0),
        ("<|us<|end|>er|>" * 10_000, 0),
        ("<|end|>" + "\u0338" * 100_000, 100_000),
        ("[[" * 20_000 + "heat:" + " " * 30_000 + "very warm" + "]]" * 20_000, len("heat: very warm")),
        ("<|us[[heat: very warm]]" * 5_000 + "er|>" * 5_000, None),
    ],
)
def test_the_time_is_linear(text, left):
    start = time.perf_counter()
    result = sanitizer(*FORBIDDEN).text(text)
    assert time.perf_counter() - start < 2.0  # quadratic: minutes
    assert left is None or len(result) == left


@pytest.mark.slow
@pytest.mark.parametrize("string", ["<|end|>", "Wanted"])
def test_code_points_around_a_string(string):
    """One text for all: what is left of the string would be found, as the separator stands in none."""
    middle = len(string) // 2
    parts = [f"{c}{string}\uffff{string}{c}\uffff{string[:middle]}{c}{string[middle:]}\uffff" for c in SOME]
    assert len(parts) > 25_000
    left = sanitizer(string).text("".join(parts))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        normal = unicodedata.normalize(form, left)
        assert string not in normal and fold(string) not in fold(normal)
