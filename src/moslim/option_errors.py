"""Messages of jsonargparse about an option, shortened to key, value and reason."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_KEY = re.compile(r'^(?:Parser key|Configuration key) "([^"]+)":?\s*(.*)$', re.DOTALL)
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':$")
_TYPE = re.compile(r"<(?:class|enum) '([\w.]+)'>")
_EXPECTED = re.compile(r"^Expected an? (.+?)(?:\. Got value: (.*))?$", re.DOTALL)
_NO_PATH = re.compile(r"^(?:Expected a dot|Unexpected) import path (?:string|format): (.*)$", re.DOTALL)
_NO_MODULE = re.compile(r"^No module named '[^']+'$")
_NO_GROUP = re.compile(
    r"""^Parser key "([^"]+)":\n *Unable to load config '(.+)'\n *- Parser key "\1": Unable to load config "\2"$"""
)
_NO_CLASS = re.compile(r"^Expected a dot import path string: (.*)$", re.DOTALL)
_NUMBER = re.compile(r"^Expected an? <class '(?:int|float)'>")
_CALLABLE = re.compile(r"^Type .+? expects a function or a callable class: (.*)$", re.DOTALL)
_NO_PART = re.compile(r"^Not a valid subclass of (\w+)\. Got value: (.*)$", re.DOTALL)
_GOT = re.compile(r"\. Got value: .*$", re.DOTALL)
_WALL = (
    "Does not validate against any of the Union subtypes",
    "Errors:",
    "Given value type:",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)
_LONGEST = 300


@dataclass
class _Line:
    """A line of a message with the lines that are indented below it."""

    text: str
    below: list[_Line] = field(default_factory=list)


@dataclass
class _Reason:
    """One of the reasons that a message gives, and where it stands."""

    keys: tuple[str, ...]
    owner: str
    text: str
    kinds: str
    value: str


def shortened(message: str, missing: Callable[[str], str] = "there is no file {}".format) -> str:
    """Returns the most telling of the reasons that a message of jsonargparse lists, as ``key: reason``.

    A value that fits none of several types gets a wall of one error for each, nested in those of the classes around
    it. The reason at the innermost key is the one that says what is wrong.

    Args:
        message: The message; one of another form comes back as it is.
        missing: Says that a file does not exist.
    """
    if group := _NO_GROUP.match(message.strip()):
        return f"{group[1]}: {missing(group[2])}"
    reasons = list(_reasons(_tree(message), (), "", "", ""))
    if not any(reason.keys for reason in reasons) and not message.startswith(_WALL):
        return message
    depth = max(len(reason.keys) for reason in reasons)
    deepest = [reason for reason in reasons if len(reason.keys) == depth]
    telling = [reason for reason in deepest if not _is_filler(reason.text)] or deepest
    first = telling[0]
    together = [reason for reason in telling if (reason.keys, reason.owner) == (first.keys, first.owner)]
    key = ".".join(first.keys)
    if file := next((name for reason in together for name in _files(reason)), None):
        return f"{key}: {missing(file)}"
    of = f" (of {first.owner})" if first.owner else ""
    return f"{key}{of}: {_said(together)}" if key else _said(together)


def _files(reason: _Reason) -> Iterator[str]:
    """The file that was taken for a class, as it could not be read."""
    names = [path[1]] if (path := _NO_PATH.match(reason.text)) else []
    names += [reason.owner, reason.value] if _NO_MODULE.match(reason.text) else []
    yield from (name for name in names if "/" in name or name.endswith((".yaml", ".yml", ".json")))


def _said(reasons: list[_Reason]) -> str:
    """The reasons for one key as one sentence."""
    value = _cut(next((reason.value for reason in reasons if reason.value), ""))
    got = ", and none is given" if value == "None" else f", not {value}" if value else ""
    if any(_NUMBER.match(reason.text) for reason in reasons):  # lr: a float, or a tensor by its class path
        reasons = [reason for reason in reasons if not _NO_CLASS.match(reason.text)]
    unknown = next((match for reason in reasons if (match := _NO_CLASS.match(reason.text))), None)
    if unknown:
        kinds = [kind for reason in reasons for kind in _TYPE.findall(reason.kinds) if "." in kind]
        names = sorted({name for kind in kinds for name in _names(kind)})
        known = f": known are {', '.join(names)}" if names else ""
        return f"there is no class {_cut(unknown[1])!r}{known}; a class of your own is named by its module and name"
    expected = [match[1] for reason in reasons if (match := _EXPECTED.match(reason.text))]
    if len(expected) == len(reasons):
        kinds = list(dict.fromkeys(_plain(kind) for kind in expected))
        return f"expected {' or '.join(kinds)}{got}"
    others = [reason.text for reason in reasons if not _EXPECTED.match(reason.text)]
    return "; ".join(dict.fromkeys(_plain(text) for text in others))


def _tree(message: str) -> list[_Line]:
    """Lines by their indentation; a line without text is left out."""
    top: list[_Line] = []
    open_lines: list[tuple[int, _Line]] = []
    for raw in message.splitlines():
        if not raw.strip():
            continue
        indent = len(raw) - len(raw.lstrip())
        line = _Line(raw.strip().removeprefix("- "))
        while open_lines and open_lines[-1][0] >= indent:
            open_lines.pop()
        (open_lines[-1][1].below if open_lines else top).append(line)
        open_lines.append((indent, line))
    return top


def _reasons(lines: list[_Line], keys: tuple[str, ...], owner: str, kinds: str, value: str) -> Iterator[_Reason]:
    for line in lines:
        if line.text.startswith("Subtypes: "):
            kinds = line.text
        elif line.text.startswith("Given value: ") and not line.text.startswith("Given value: NestedArg("):
            value = _GOT.sub("", line.text.removeprefix("Given value: "))
    for line in lines:
        if key := _KEY.match(line.text):
            rest = [_Line(key[2])] if key[2] else []
            yield from _reasons([*rest, *line.below], (*keys, key[1]), owner, "", "")
        elif found := _CLASS.match(line.text):
            yield from _reasons(line.below, keys, found[1], kinds, value)
        elif part := _NO_PART.match(line.text):
            got = value if "NestedArg(" in part[2] else part[2]
            yield _Reason(keys, owner, f"Expected a {part[1]}", kinds, got)
        elif called := _CALLABLE.match(line.text):
            inner = _Line(called[1] if _KEY.match(called[1]) else _GOT.sub("", called[1]), line.below)
            got = _GOT.search(called[1])
            yield from _reasons([inner], keys, owner, kinds, got[0].removeprefix(". Got value: ") if got else value)
        elif line.text.startswith(_WALL):
            yield from _reasons(line.below if line.text == "Errors:" else [], keys, owner, kinds, value)
        elif not line.text.startswith(("Subtypes: ", "Given value: ")):
            text = " ".join([line.text, *_flat(line.below)])
            match = _EXPECTED.match(text)
            yield _Reason(keys, owner, text, kinds, match[2] if match and match[2] else value)


def _flat(lines: list[_Line]) -> Iterator[str]:
    for line in lines:
        yield line.text
        yield from _flat(line.below)


def _is_filler(text: str) -> bool:
    """Whether a reason holds of every value: it is not null, or not the path of a file."""
    return text.startswith(("Expected a <class 'NoneType'>", "Expected a path but ", "Expected a <class 'bool'>"))


def _plain(text: str) -> str:
    """Types as one writes them."""
    text = _TYPE.sub(lambda match: match[1].removeprefix("collections.abc."), text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", text)
    return text.replace("NoneType", "null").replace("typing.", "")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _names(path: str) -> Iterator[str]:
    """Names of the classes in use that may stand where the class of that path is wanted."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type):
        return
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        if not getattr(child, "__abstractmethods__", None) and not child.__name__.startswith("_"):
            yield child.__name__
        yield from _names(f"{child.__module__}.{child.__qualname__}")
