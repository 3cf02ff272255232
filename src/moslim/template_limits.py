"""A chat template is a program of whoever made the tokenizer: it is tried out where it can do no harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from transformers import PreTrainedTokenizerBase

from moslim.errors import UsageError

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
