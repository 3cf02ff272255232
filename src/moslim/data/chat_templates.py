"""Chat templates: fixed arguments and date, and limits for templates of others.

A chat template is a program of whoever made the tokenizer: it is tried out where it can do no harm.

Chat templates that render the same prompt on every day: arguments and date stand in the template itself.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from moslim.utils.errors import UsageError

SECONDS = 20
"""Time that a template has for the chats it is tried out on, and later for each chat."""

_LONGEST = 100_000
"""Most characters that it may write around a few words."""

_MEMORY = 4 * 2**30

_HARMLESS = (
    nodes.Template | nodes.Output | nodes.TemplateData | nodes.Name | nodes.Const | nodes.Getattr | nodes.Getitem
    | nodes.Slice | nodes.If | nodes.CondExpr | nodes.Compare | nodes.Operand | nodes.And | nodes.Or | nodes.Not
    | nodes.Test | nodes.Dict | nodes.Pair
)  # fmt: skip
_FILTERS = {"trim", "upper", "lower", "capitalize", "title", "length", "first", "last", "tojson"}
_METHODS = {"strip", "lstrip", "rstrip", "upper", "lower", "capitalize", "title", "get", "startswith", "endswith"}

_CHILD = """
import json, sys
from datetime import datetime
task = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
except (ImportError, ValueError, OSError):
    pass
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
def refuse(message):
    raise ValueError(message)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
    value, ensure_ascii=ensure_ascii, **options
)
environment.globals.update(raise_exception=refuse, strftime_now=lambda format: datetime.now().strftime(format))
for chat in task["chats"]:
    for begins in (True, False):
        try:
            text = environment.from_string(task["template"]).render(
                messages=chat, tools=None, documents=None, add_generation_prompt=begins, **task["tokens"]
            )
        except MemoryError:
            sys.exit(3)
        except Exception:
            continue
        if len(text) > task["longest"] + 4 * len(json.dumps(chat)):
            sys.exit(3)
"""


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Tries a tokenizer's chat template out in a process of its own, with limits on time, memory and output.

    Args:
        tokenizer: The tokenizer.
        name: What to call it.

    Raises:
        UsageError: The template does not end within the limits.
    """
    if tokenizer.chat_template is None:
        return
    template = tokenizer.get_chat_template()
    if _is_simple(template):
        return
    tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if not _ends(template, json.dumps(tokens), SECONDS):
        raise UsageError(
            f"the chat template of the tokenizer '{name}' does not end: for a chat of a few words it takes more than "
            f"{SECONDS} seconds, {_MEMORY // 2**30} GiB, or {_LONGEST} characters; take another tokenizer, or mend its "
            "chat_template"
        )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer; only in the main thread, and where no other alarm is set.

    Args:
        seconds: Time for what stands in the block.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@lru_cache(maxsize=64)
def _is_simple(template: str) -> bool:
    """Whether a template is one loop over the messages at most, and nothing that could grow: it ends."""
    try:
        tree = Environment(trim_blocks=True, lstrip_blocks=True).parse(template)
    except (TemplateError, RecursionError):
        return False
    return _harmless(tree, loops=1)


def _harmless(node: nodes.Node, loops: int) -> bool:
    match node:
        case nodes.For(recursive=False):
            of = node.iter.node if isinstance(node.iter, nodes.Getitem) else node.iter
            known = isinstance(of, nodes.Name) and of.name == "messages" and loops > 0
            loops -= 1
        case nodes.Filter():
            known = node.name in _FILTERS and not node.args and not node.kwargs
        case nodes.Call(node=nodes.Name(name="raise_exception")):
            known = True
        case nodes.Call(node=nodes.Getattr(attr=method)):
            known = method in _METHODS
        case nodes.Add():
            known = True
        case _:
            known = isinstance(node, _HARMLESS)
    return known and all(_harmless(child, loops) for child in node.iter_child_nodes())


@lru_cache(maxsize=64)
def _ends(template: str, tokens: str, seconds: int) -> bool:
    turns = [{"role": role, "content": "a few words"} for role in ("system", *("user", "assistant") * 8, "user")]
    long = [{"role": "user", "content": "Some words, and 12 more.\n\n" * 100}]
    chats = [turns[-1:], [turns[0], turns[-1]], turns[1:4], turns[1:], turns, long]
    task = {
        "template": template,
        "tokens": json.loads(tokens),
        "chats": chats,
        "memory": _MEMORY,
        "longest": _LONGEST,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(task),
            text=True,
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode in (0, 1)  # 1: it could not be tried out, e.g. as it is no valid JSON


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
