"""A chat template is a program of whoever made the tokenizer: it is tried out where it can do no harm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from moslim.errors import UsageError

SECONDS = 20
"""Time that a template has for the chats it is tried out on."""

_LONGEST = 100_000
"""Most characters that it may write around a few words."""

_MEMORY = 4 * 2**30
_PLAIN = re.compile(r"(?!.*(\*|range|macro|recursive|\bset\b|~|\bfor\b.*\bfor\b)).*", re.DOTALL)
"""One loop over the messages, and nothing that grows: it ends."""

_CHILD = """
import json, sys
task = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
except (ImportError, ValueError, OSError):
    pass
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message):
    raise ValueError(message)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **options: json.dumps(value)
environment.globals.update(raise_exception=refuse, strftime_now=lambda format: format)
for chat in task["chats"]:
    try:
        text = environment.from_string(task["template"]).render(
            messages=chat, add_generation_prompt=True, **task["tokens"]
        )
    except MemoryError:
        sys.exit(3)
    except Exception:
        continue
    if len(text) > task["longest"]:
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
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.get_chat_template())
    if _PLAIN.fullmatch(template):
        return
    tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if not _ends(template, json.dumps(tokens), SECONDS):
        raise UsageError(
            f"the chat template of the tokenizer '{name}' does not end: for a chat of a few words it takes more than "
            f"{SECONDS} seconds, {_MEMORY // 2**30} GiB, or {_LONGEST} characters; take another tokenizer, or mend its "
            "chat_template"
        )


@lru_cache(maxsize=64)
def _ends(template: str, tokens: str, seconds: int) -> bool:
    turns = [{"role": role, "content": "a few words"} for role in ("system", *("user", "assistant") * 8, "user")]
    chats = [turns[-1:], [turns[0], turns[-1]], turns[1:4], turns[1:], turns]
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
