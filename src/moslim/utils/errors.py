"""Errors that users can fix, the parsing of numbers and texts in tables and options, and quoting in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any


class UsageError(ValueError):
    """Mistake in an option, a config, data, weights or labels.

    The message says what is wrong, where, and what to do. The command line prints it without a traceback and exits with
    status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """Missing or unreadable file, folder or Hub name."""


Scalar = str | int | float | bool | None
"""Text option before :func:`as_text` checks it; YAML reads some texts as numbers or truth values."""

_PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?|-?\.[0-9]+")
_EXPONENT = re.compile(r"-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+")
_LONGEST = 40
"""Maximum characters of a number."""
_SHORT = 16
"""Maximum characters of a JSON number without exponent that converts to a float without loss."""
_QUOTED = 80
_LISTED = 400


class InexactFloat(float):
    """Number of a JSON file that a float rounds.

    Args:
        written: Text of the number.
    """

    written: str

    def __new__(cls, written: str) -> InexactFloat:
        """Returns the nearest float, with the text as an attribute."""
        rounded = super().__new__(cls, written)
        rounded.written = written
        return rounded

    def __repr__(self) -> str:
        """Returns the text, so that messages quote the file."""
        return self.written


def json_float(written: str) -> float:
    """Parses a JSON number; returns an :class:`InexactFloat` if the float is rounded."""
    parsed = float(written)
    if len(written) <= _SHORT and written.isascii() and "e" not in written.lower():
        return parsed
    exact = len(written) <= _LONGEST and abs(parsed) < float("inf") and Decimal(written) == Decimal(repr(parsed))
    return parsed if exact else InexactFloat(written)


def as_number(value: Any) -> Decimal:
    """Converts a value of a table to a number.

    A text is a number if it is a plain integer or decimal in ASCII digits of at most 40 characters: ``3``, ``-0.25``,
    ``.5``. Plus signs, exponents, underscores, leading zeros, ``inf`` and ``nan`` are not allowed. Truth values are not
    numbers.

    Args:
        value: A text, or a number of JSON or parquet.

    Raises:
        UsageError: The value is not such a number.
    """
    if isinstance(value, bool):
        raise UsageError(f"value {value} is a truth value, not a number")
    if isinstance(value, str):
        written, allowed = value.strip(), _PLAIN.fullmatch(value.strip()[: _LONGEST + 1])
    elif isinstance(value, InexactFloat):
        written, allowed = value.written, _PLAIN.fullmatch(value.written[: _LONGEST + 1])
    elif isinstance(value, int):
        written = str(value) if abs(value) < 10**_LONGEST else "9" * (_LONGEST + 1)
        allowed = _PLAIN.fullmatch(written)
    elif isinstance(value, float):
        written = repr(value)
        allowed = _PLAIN.fullmatch(written) or _EXPONENT.fullmatch(written)
    elif isinstance(value, Decimal) and value.is_finite():
        return value
    else:
        raise UsageError(f"value {quoted(value)} is not a number")
    if len(written) > _LONGEST:
        raise UsageError(f"value {quoted(value)} is not a number: it has more than {_LONGEST} characters")
    if allowed is None:
        raise UsageError(
            f"value {quoted(value)} is not a number: write a plain integer or decimal, such as 3, -1 or 0.25"
        )
    return Decimal(written)


def as_whole_number(value: Any) -> int:
    """Converts a value of a table to a whole number; ``2.0`` is one.

    Raises:
        UsageError: The value is no number (see :func:`as_number`), or has a fraction.
    """
    number = as_number(value)
    if number != number.to_integral_value():
        raise UsageError(f"value {quoted(value)} is not a whole number")
    return int(number)


def as_text(value: Any, option: str) -> str:
    """Returns the text of an option; a whole number becomes its digits.

    Args:
        value: Value from Python or YAML.
        option: Name of the option, for the error message.

    Raises:
        UsageError: The value is no text, since YAML has parsed it as something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UsageError(
        f"{option}: {quoted(value)} is a {_type_name(value)}, not a text; YAML reads words such as no, on, true, null "
        f'and 1.50 so: put it in quotes, e.g. "no"'
    )


def is_same(value: Any, text: str) -> bool:
    """Whether a value of a table equals the text of an option.

    Texts are compared without surrounding white space, ``true`` and ``false`` also without case. Numbers of JSON or
    parquet are compared as numbers, and truth values with ``true`` and ``false``.

    Args:
        value: Value of a table, not missing.
        text: Text of the option.
    """
    text = text.strip()
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int | float | Decimal):
        try:
            return as_number(value) == as_number(text)
        except UsageError:
            return str(value) == text
    value_text = str(value).strip()
    return value_text == text or (value_text.lower() == text.lower() and value_text.lower() in ("true", "false"))


def quoted(value: Any, limit: int = _QUOTED) -> str:
    """Formats a value for an error message: on one line, cut after ``limit`` characters."""
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def listed(names: Iterable[Any]) -> str:
    """Joins names by commas, and cuts the text after 400 characters."""
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= _LISTED else f"{text[:_LISTED]}..."


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "number with a fraction" if isinstance(value, float) else "null" if value is None else type(value).__name__
