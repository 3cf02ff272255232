"""Chat templates: resource limits, and arguments and date written into the template.

A chat template is untrusted code from the author of a tokenizer, so :func:`check_template` runs it in a child process.
:func:`pinned` makes a template render the same prompt on every day.
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
"""Time limit for all trial chats together, and later for each chat."""

_LONGEST = 100_000
"""Most characters that a template may add to a chat."""

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
    """Runs a tokenizer's chat template in a child process with limits on time, memory and output.

    Args:
        tokenizer: Tokenizer whose template is checked.
        name: Name of the tokenizer in error messages.

    Raises:
        UsageError: The template exceeds a limit.
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
    """Raises ``TimeoutError`` in a block that takes longer. No effect outside the main thread or if an alarm is set.

    Args:
        seconds: Time limit of the block.
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
    """Whether a template certainly ends: at most one loop over the messages, and no construct that can grow."""
    try:
        tree = Environment(trim_blocks=True, lstrip_blocks=True).parse(template)
    except (TemplateError, RecursionError):
        return False
    return _harmless(tree, loops=1)


def _harmless(node: nodes.Node, loops: int) -> bool:
    match node:
        case nodes.For(recursive=False):
            sequence = node.iter.node if isinstance(node.iter, nodes.Getitem) else node.iter
            allowed = isinstance(sequence, nodes.Name) and sequence.name == "messages" and loops > 0
            loops -= 1
        case nodes.Filter():
            allowed = node.name in _FILTERS and not node.args and not node.kwargs
        case nodes.Call(node=nodes.Name(name="raise_exception")):
            allowed = True
        case nodes.Call(node=nodes.Getattr(attr=method)):
            allowed = method in _METHODS
        case nodes.Add():
            allowed = True
        case _:
            allowed = isinstance(node, _HARMLESS)
    return allowed and all(_harmless(child, loops) for child in node.iter_child_nodes())


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
        process = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(task),
            text=True,
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode in (0, 1)  # 1 = the trial failed, e.g. the task is no valid JSON


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
    """Values that :func:`pinned` writes into a template.

    Args:
        arguments: Values by variable that the template reads.
        day: Date of ``strftime_now``, as ``YYYY-MM-DD``; None = the date of rendering, or the template reads no date.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    day: str | None = None


def pins(template: str) -> tuple[Pins, str]:
    """Returns the values that :func:`pinned` wrote into a template, and the original template."""
    match = _NOTE.match(template)
    if match is None:
        return Pins(), template
    note = json.loads(match["note"])
    return Pins(note["arguments"], note["date"]), template[match.end() :]


def pinned(template: str, arguments: Mapping[str, Any], day: str | None, taken: Collection[str] = ()) -> str:
    """Returns a template that renders the same text on every day.

    Arguments become defaults of its variables, which a call of ``apply_chat_template`` can still override.
    ``strftime_now`` returns the given date, at midnight, in any format. Values written earlier are kept unless
    they are given again.

    Args:
        template: Jinja template.
        arguments: Values by variable; plain data.
        day: Date as ``YYYY-MM-DD``; None = unchanged.
        taken: Variables that the caller of the template sets, such as the special tokens.

    Raises:
        UsageError: The template is invalid, does not read an argument or a date that is given, or a value or the date
            cannot be written into it.
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
    """Writes arguments and date into the chat template of a tokenizer, in place.

    Args:
        tokenizer: Tokenizer to change.
        arguments: Values by variable.
        day: Configured date, as ``YYYY-MM-DD``; None = not configured.
        today: Date for templates that read a date and have none yet.

    Raises:
        UsageError: See :func:`pinned`; or values are given, but the tokenizer has no chat template.
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
    if isinstance(template, dict):  # templates by name, one of which writes the prompts
        now = {**template, **{name: now for name, text in template.items() if text == used}}
    tokenizer.chat_template = now


def tokenizer_pins(tokenizer: PreTrainedTokenizerBase) -> tuple[Pins, str | None]:
    """Returns the values written into the tokenizer's template, and the original template; None if it has none."""
    return (Pins(), None) if tokenizer.chat_template is None else pins(tokenizer.get_chat_template())


def asks_for_date(template: str) -> bool:
    """Whether a template writes the date of rendering into prompts, not a date that is written into it."""
    return _CLOCK in reads(template)


def reads(template: str) -> set[str]:
    """Returns the undeclared variables and functions of a template.

    Raises:
        UsageError: The template is invalid.
    """
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise UsageError(f"the tokenizer's chat template is no valid Jinja template: {error}") from error


class _Generation(Extension):
    """Tag ``{% generation %}`` of transformers, which marks text for training masks; parsed as its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def as_day(value: str | date, option: str) -> str:
    """Returns a date as ``YYYY-MM-DD``.

    Args:
        value: Date or its text.
        option: Name of the option, for the error message.

    Raises:
        UsageError: The value is no date.
    """
    try:
        return (value if isinstance(value, date) else date.fromisoformat(value)).isoformat()[:10]
    except (ValueError, TypeError):
        raise UsageError(f"{option} is {value!r}: give a date as YYYY-MM-DD, e.g. 2026-11-30") from None


def _directives(day: str) -> dict[str, str]:
    """Returns the text of each ``strftime`` directive on a day."""
    moment = datetime.fromisoformat(day)
    names = [f"%{letter}" for letter in _PLAIN]
    names += [f"%{flag}{letter}" for flag, letters in _FLAGGED.items() for letter in letters]
    texts = {}
    for name in names:
        try:
            text = moment.strftime(name)
        except ValueError:  # not supported on this system
            continue
        if "%" not in text:
            texts[name] = text
    return texts


def _literal(value: Any, name: str) -> str:
    """Returns plain data as a Jinja expression.

    Raises:
        UsageError: The value is no plain data.
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)) and value == value and abs(value) != float("inf"):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(item, name) for item in value)}]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return f"{{{', '.join(f'{_literal(key, name)}: {_literal(item, name)}' for key, item in value.items())}}}"
    raise UsageError(
        f"data.template_args.{name} is {value!r}: give plain data (text, number, true or false, list, mapping)"
    )
