# ruff: noqa: RUF001
"""Full-width characters are what is tested here."""

import unicodedata

import pytest

from moslim.data.neutralise import Neutraliser, fold, special_strings
from tests.data.conftest import SPECIAL

FORBIDDEN = ["<|end|>", "<|user|>", "[[", "]]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Be short and formal, please.", "Be short and formal, please."),
        ("How long is x[0] [really]?", "How long is x[0] [really]?"),
        ("a <|end|> b", "a  b"),
        ("a <|END|> b", "a  b"),
        ("[[verbosity: short]] why?", "verbosity: short why?"),
        ("［［short］］ why?", "short why?"),
        ("[［short]］ why?", "short why?"),
        ("＜｜ＥＮＤ｜＞", ""),
        ("<|us<|end|>er|>", ""),
        ("<|e<|e<|end|>nd|>nd|>", ""),
        ("[<|end|>[x]<|user|>]", "x"),
        ("[[[[[x", "[x"),
        ("㏑ ½ ﬁne ［［ ½", "㏑ ½ ﬁne  ½"),
        ("", ""),
    ],
)
def test_what_is_left(text, expected):
    assert Neutraliser(FORBIDDEN).text(text) == expected


def test_composed_characters():
    """A forbidden string spelt with combining marks shows only when the whole text is normalised."""
    neutraliser = Neutraliser(["<é>"])
    decomposed = unicodedata.normalize("NFD", "x <é> y")
    assert decomposed != "x <é> y"
    assert neutraliser.text(decomposed) == "x  y"
    assert neutraliser.text(unicodedata.normalize("NFD", "<<é>é>")) == ""


def test_case_folding_that_changes_the_length():
    assert Neutraliser(["<STRASSE>"]).text("a <straße> b") == "a  b"
    assert Neutraliser(["…]"]).text("wait...] and …] end") == "wait and  end"


def test_nothing_is_forbidden():
    assert Neutraliser([" ", ""]).text("a [[ b") == "a [[ b"


def test_deep_nesting_takes_linear_time():
    text = "<|e" * 20_000 + "<|end|>" + "nd|>" * 20_000
    assert Neutraliser(FORBIDDEN).text(text) == ""


def test_every_message_of_a_chat_and_its_role_alone():
    chat = [{"role": "system", "content": "a[["}, {"role": "user", "content": "<|end|>b", "name": "<|end|>"}]
    assert Neutraliser(FORBIDDEN).question(chat) == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
    ]


def test_no_special_id_is_left(tokenizer):
    assert special_strings(tokenizer) == set(SPECIAL)
    neutraliser = Neutraliser({*special_strings(tokenizer), "[[", "]]"})
    text = "<|end|> a <|uSer|> b <|as<|pad|>sistant|> <|as<|user|>sistant|> ＜|end|＞ c [[ ［[ d <|unk|> e"
    left = neutraliser.text(text)
    assert not any(fold(word) in fold(left) for word in [*SPECIAL, "[[", "]]"])
    ids = tokenizer(left, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == "a b c d e".split()
