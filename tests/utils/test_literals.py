from decimal import Decimal

import pytest

from moslim.utils.errors import (
    InexactFloat,
    UsageError,
    as_number,
    as_text,
    as_whole_number,
    is_same,
    json_float,
    listed,
    quoted,
)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("3", "3"),
        (" -0.25 ", "-0.25"),
        (".5", "0.5"),
        ("0", "0"),
        (7, "7"),
        (2.0, "2"),
        (1e-05, "0.00001"),
        (Decimal("1.50"), "1.5"),
        ("4.000000000000000000001", "4.000000000000000000001"),
    ],
)
def test_a_plain_integer_or_decimal_is_a_number(value, number):
    assert as_number(value) == Decimal(number)


@pytest.mark.parametrize(
    "value",
    [
        *(
            True,
            False,
            None,
            [],
            [1],
            {},
            "",
            "true",
            "0_1",
            "1_000",
            "+1",
            "1e0",
            "1E5",
            "\uff12",
            "\u0663",
            "\xb2",
            "\xbd",
            "\u2163",
        ),
        *(
            "inf",
            "-inf",
            "Infinity",
            "nan",
            "0x1",
            "0b1",
            "01",
            "007",
            "1.",
            ".",
            "-",
            "--1",
            "- 1",
            "1,5",
            "1 000",
            "1/2",
        ),
        *(
            float("inf"),
            float("nan"),
            10**60,
            "9" * 41,
            "0." + "1" * 50,
            json_float("1e400"),
            json_float("4." + "0" * 50),
        ),
        *(Decimal("NaN"), b"1", "1\x00", "1\u0338"),
    ],
)
def test_nothing_else_is_a_number(value):
    with pytest.raises(UsageError, match=r"^value .* is (not a number|a truth value)"):
        as_number(value)


def test_a_whole_number_has_no_fraction():
    assert [as_whole_number(value) for value in ("3", 3, 3.0, "3.0", "-2")] == [3, 3, 3, 3, -2]
    for value in (2.9, "2.9", json_float("4.000000000000000000001"), "4.000000000000000000001"):
        with pytest.raises(UsageError, match="is not a whole number"):
            as_whole_number(value)


def test_json_numbers_that_a_float_rounds_keep_their_text():
    assert type(json_float("0.1")) is type(json_float("1e-05")) is float
    rounded = json_float("0.29999999999999999999")
    assert isinstance(rounded, InexactFloat) and rounded == 0.3
    assert as_number(rounded) < Decimal("0.3") == as_number(0.3)


@pytest.mark.parametrize(
    ("value", "text", "same"),
    [
        ("no", "no", True),
        (" no ", "no", True),
        ("No", "no", False),
        ("TRUE", "true", True),
        (True, "True", True),
        (True, "1", False),
        (True, "yes", False),
        (False, "false", True),
        (False, "0", False),
        (1, "1", True),
        (1.0, "1", True),
        (1, "1.0", True),
        (1, "true", False),
        ("1.0", "1", False),
        ("01", "1", False),
        (0.5, "0.50", True),
        (0.5, "half", False),
        ("n/a", "N/A", False),
    ],
)
def test_a_value_of_a_table_is_compared_with_the_text_of_an_option(value, text, same):
    assert is_same(value, text) is same


def test_texts_that_yaml_has_lost_are_refused():
    assert as_text("no", "x") == "no" and as_text(10, "x") == "10"
    for value in (True, None, 1.5):
        with pytest.raises(UsageError, match=r"^x: .*put it in quotes"):
            as_text(value, "x")


@pytest.mark.slow
def test_what_messages_quote_is_short():
    assert quoted("a") == "'a'" and quoted([1]) == "[1]"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, ["y"] * 10**5, {"z": "z" * 500}, 10**5000, deep, b"b" * 10**6):
        assert len(quoted(value)) < 130
    assert listed(["a", "b"]) == "a, b" and len(listed(["x" * 10**6])) < 450
