"""Errors that a user can mend, and the reading of numbers and texts that raise them.

Errors that the user of this package can mend.

Numbers and texts as people write them in tables and options, and values as error messages quote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any


class UsageError(ValueError):
    """A mistake in an option, a config, data, weights or labels.

    Its message says what is wrong, where, and what to do. The command line prints it without a traceback and exits
    with status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file, folder or Hub name that does not exist or cannot be read."""


Scalar = str | int | float | bool | None
"""A text of an option, before :func:`as_text` has checked it: YAML reads some texts as numbers or truth values."""

_PLAIN = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?|-?\.[0-9]+")
_EXPONENT = re.compile(r"-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+")
_LONGEST = 40
"""Most characters of a number."""
_SHORT = 16
"""A JSON number of at most so many characters and no exponent is a float without loss."""
_QUOTED = 80
_LISTED = 400


class InexactFloat(float):
    """A number of a JSON file that a float rounds; ``written`` is its text.

    Args:
        written: The text.
    """

    written: str

    def __new__(cls, written: str) -> InexactFloat:
        """Returns the nearest float, with the text beside it."""
        found = super().__new__(cls, written)
        found.written = written
        return found

    def __repr__(self) -> str:
        """Returns the text, so that messages show what stands in the file."""
        return self.written


def json_float(written: str) -> float:
    """Returns the float that a JSON number stands for, an :class:`InexactFloat` where it is another number."""
    found = float(written)
    if len(written) <= _SHORT and written.isascii() and "e" not in written.lower():
        return found
    exact = len(written) <= _LONGEST and abs(found) < float("inf") and Decimal(written) == Decimal(repr(found))
    return found if exact else InexactFloat(written)


def as_number(value: Any) -> Decimal:
    """Returns the number that a value of a table is.

    A text is a number if it is a plain integer or decimal in ASCII digits: ``3``, ``-0.25``, ``.5``. No plus sign, no
    exponent, no underscores, no leading zeros, no ``inf`` or ``nan``, at most 40 characters. A truth value is none.

    Args:
        value: A text, or a number of JSON or parquet.

    Raises:
        UsageError: The value is no such number.
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
    """Returns the whole number that a value of a table is; ``2.0`` is one.

    Raises:
        UsageError: The value is no number (:func:`as_number`), or has a fraction.
    """
    number = as_number(value)
    if number != number.to_integral_value():
        raise UsageError(f"value {quoted(value)} is not a whole number")
    return int(number)


def as_text(value: Any, option: str) -> str:
    """Returns a text of an option; a whole number is its digits.

    Args:
        value: The text, as Python or YAML gives it.
        option: Name of the option, for the error message.

    Raises:
        UsageError: The value is none: YAML has read it as something else, so that its own text is lost.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UsageError(
        f"{option}: {quoted(value)} is a {_kind(value)}, not a text; YAML reads words such as no, on, true, null "
        f'and 1.50 so: put it in quotes, e.g. "no"'
    )


def is_same(value: Any, text: str) -> bool:
    """Whether a value of a table is what a text of an option stands for.

    A text is compared as it is, without the white space around it; ``true`` and ``false`` in any case. A number of JSON
    or parquet is compared as a number, a truth value with ``true`` and ``false``.

    Args:
        value: A value that is not missing.
        text: The text of the option.
    """
    wanted = text.strip()
    if isinstance(value, bool):
        return wanted.lower() == str(value).lower()
    if isinstance(value, int | float | Decimal):
        try:
            return as_number(value) == as_number(wanted)
        except UsageError:
            return str(value) == wanted
    found = str(value).strip()
    return found == wanted or (found.lower() == wanted.lower() and found.lower() in ("true", "false"))


def quoted(value: Any, limit: int = _QUOTED) -> str:
    """Returns a value as error messages show it: on one line, cut after some 80 characters."""
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def listed(names: Iterable[Any]) -> str:
    """Returns names joined by commas, cut after some 400 characters."""
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= _LISTED else f"{text[:_LISTED]}..."


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "number with a fraction" if isinstance(value, float) else "null" if value is None else type(value).__name__
