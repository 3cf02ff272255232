"""Chat templates that render the same prompt on every day: arguments and date stand in the template itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from moslim.errors import UsageError

_NOTE = re.compile(r"\A\{#- moslim: (?P<note>.*?) #\}\n(?P<header>.*?)\{#- end of moslim's part #\}\n", re.DOTALL)
_CLOCK = "strftime_now"
_FROM_RENDERING = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    _CLOCK,
    *DEFAULT_NAMESPACE,
}
_PLAIN = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf"
_FLAGGED = {"-": "dmHIMSjyuwUWVekl", "_": "dmHIMSj", "0": "ekl", "^": "aAbBhpcZ", "#": "aAbBhpZdmHIMSj"}
_MACRO = """{%%- macro strftime_now(format) %%}
{%%- set date = namespace(parts=[]) %%}
{%%- for part in format.split("%%%%") %%}
{%%- set text = namespace(value=part) %%}
{%%- for directive, value in %s.items() %%}
{%%- set text.value = text.value.replace(directive, value) %%}
{%%- endfor %%}
{%%- set date.parts = date.parts + [text.value] %%}
{%%- endfor %%}
{{- date.parts | join("%%") }}
{%%- endmacro %%}
"""


@dataclass(frozen=True)
class Pins:
    """What a template was given to stand in it.

    Args:
        arguments: Values of variables that it reads.
        day: Date of its ``strftime_now``, as ``YYYY-MM-DD``; None = the date of rendering, or it asks for none.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    day: str | None = None


def pins(template: str) -> tuple[Pins, str]:
    """Returns what :func:`pinned` has put into a template, and the template without it."""
    found = _NOTE.match(template)
    if found is None:
        return Pins(), template
    note = json.loads(found["note"])
    return Pins(note["arguments"], note["date"]), template[found.end() :]


def pinned(template: str, arguments: Mapping[str, Any], day: str | None, taken: Collection[str] = ()) -> str:
    """Returns a template that renders alike for ever.

    Arguments become defaults of its variables, which a call of ``apply_chat_template`` can still override. The date of
    ``strftime_now``, whatever the format and however it is made, becomes a fixed one, at midnight. What was put into
    the template before stays, unless it is given anew.

    Args:
        template: The template, in Jinja.
        arguments: Values by variable; plain data.
        day: ``YYYY-MM-DD``; None = as it is.
        taken: Variables that whatever renders the template sets itself, such as the special tokens.

    Raises:
        UsageError: The template does not read an argument, or asks for no date though one is given; it is no valid
            template; or a value or the date cannot be written into it.
    """
    before, plain = pins(template)
    read = reads(plain)
    free = read - _FROM_RENDERING - set(taken)
    offered = ", ".join(sorted(free)) or "none"
    unread = sorted(set(arguments) - free)
    if unread:
        raise UsageError(
            f"data.template_args gives {', '.join(unread)}, which the tokenizer's chat template does not read; the "
            f"variables that it reads, and that can be set, are: {offered}"
        )
    if day is not None and _CLOCK not in read:
        raise UsageError(
            f"data.template_date is {day}, but the tokenizer's chat template does not ask for the date "
            f"({_CLOCK}): leave it out; variables that data.template_args can set: {offered}"
        )
    now = Pins({**before.arguments, **arguments}, day or before.day)
    if now == Pins():
        return plain
    defaults = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value, name)} %}}{{%- endif %}}\n"
        for name, value in now.arguments.items()
    ]
    note = json.dumps({"arguments": now.arguments, "date": now.day}).replace("#}", "#\\u007d")
    lines = [f"{{#- moslim: {note} #}}\n", *defaults]
    if now.day is not None:
        lines.append(_MACRO % _literal(_directives(now.day), _CLOCK))
    return "".join([*lines, "{#- end of moslim's part #}\n", plain])


def pin_tokenizer(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], day: str | None, today: str | None = None
) -> None:
    """Puts arguments and date into the chat template of a tokenizer, in place.

    Args:
        tokenizer: The tokenizer.
        arguments: Values by variable.
        day: The date that was asked for.
        today: The date of templates that ask for one and have none yet.

    Raises:
        UsageError: See :func:`pinned`; or there is no chat template to put anything into.
    """
    template: Any = tokenizer.chat_template
    if template is None:
        if arguments or day is not None:
            raise UsageError(
                "data.template_args or data.template_date is given, but the tokenizer has no chat template: leave them "
                "out"
            )
        return
    used = tokenizer.get_chat_template()
    if day is None and asks_for_date(used):
        day = today
    now: Any = pinned(used, arguments, day, tokenizer.special_tokens_map)
    if isinstance(template, dict):  # several by name, of which one writes the prompts
        now = {**template, **{name: now for name, text in template.items() if text == used}}
    tokenizer.chat_template = now


def tokenizer_pins(tokenizer: PreTrainedTokenizerBase) -> tuple[Pins, str | None]:
    """What stands in the template that writes prompts, and that template without it; None where there is none."""
    return (Pins(), None) if tokenizer.chat_template is None else pins(tokenizer.get_chat_template())


def asks_for_date(template: str) -> bool:
    """Whether a template writes the date of rendering into prompts; one with a date of its own does not."""
    return _CLOCK in reads(template)


def reads(template: str) -> set[str]:
    """Variables and functions that a template expects from outside.

    Raises:
        UsageError: It is no valid Jinja template.
    """
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise UsageError(f"the tokenizer's chat template is no valid Jinja template: {error}") from error


class _Generation(Extension):
    """The tag ``{% generation %}`` of transformers, which is about training masks; only its content matters here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def as_day(value: str | date, option: str) -> str:
    """Returns a date as ``YYYY-MM-DD``.

    Raises:
        UsageError: It is none.
    """
    try:
        return (value if isinstance(value, date) else date.fromisoformat(value)).isoformat()[:10]
    except (ValueError, TypeError):
        raise UsageError(f"{option} is {value!r}: give a date as YYYY-MM-DD, e.g. 2026-11-30") from None


def _directives(day: str) -> dict[str, str]:
    """The text of each ``strftime`` directive on a day."""
    moment = datetime.fromisoformat(day)
    names = [f"%{letter}" for letter in _PLAIN]
    names += [f"%{flag}{letter}" for flag, letters in _FLAGGED.items() for letter in letters]
    found = {}
    for name in names:
        try:
            text = moment.strftime(name)
        except ValueError:  # this system does not know it
            continue
        if "%" not in text:
            found[name] = text
    return found


def _literal(value: Any, name: str) -> str:
    """Plain data as a Jinja expression.

    Raises:
        UsageError: It is none.
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)) and value == value and abs(value) != float("inf"):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(one, name) for one in value)}]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return f"{{{', '.join(f'{_literal(key, name)}: {_literal(one, name)}' for key, one in value.items())}}}"
    raise UsageError(
        f"data.template_args.{name} is {value!r}: give plain data (text, number, true or false, list, mapping)"
    )
