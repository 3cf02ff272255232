"""YAML as users of this package mean it: what stands where a text is wanted stays the text that is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from moslim.layers import located

TEXTS = ("columns", "compared", "constants", "counts", "dimensions", "keep", "missing", "where")
"""Options that hold texts: every scalar in a list or mapping below one is the text that is written."""
_STR, _INT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "null", "merge"))
_PLAIN_INTEGER = re.compile("-?(0|[1-9][0-9]*)")


def install() -> None:
    """Lets configs and options be read so, with the paths of the shipped configs that they name."""
    plain = get_loader("yaml")
    if getattr(plain, "quotes_texts", False):
        return

    def load(stream: str, **kwargs: Any) -> Any:
        return located(plain(quote_texts(stream), **kwargs))

    load.quotes_texts = True  # type: ignore[attr-defined]
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def quote_texts(stream: str) -> str:
    """Puts quotes around scalars that YAML would read as numbers or truth values where a text is wanted.

    These are the keys of all mappings, ``{1: 0, no: 1}``; what stands in lists and mappings below an option of
    :data:`TEXTS`, ``where: {lang: [no]}``; and whole numbers that are not written plainly, such as ``010``, which an
    option of a number reads all the same. A ``null`` in a list that is an option's whole value is a text, too: the
    parser would make the text ``None`` of it. All else stays as it is.

    Args:
        stream: A YAML document, or the value of an option.

    Raises:
        yaml.YAMLError: A mapping has a key twice.
    """
    if not any(mark in stream for mark in ":{["):
        return stream
    try:
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # the loader says what is wrong
        return stream
    if root is None:
        return stream
    listed = isinstance(root, yaml.SequenceNode)
    places = {
        (node.start_mark.index, node.end_mark.index): node.value
        for node, wanted in _scalars(root, wanted=False, seen=set())
        if node.value and node.style is None and _is_lost(node, wanted, listed)
    }
    for (start, end), text in sorted(places.items(), reverse=True):
        if stream[start:end] == text:  # and no anchor or tag before it
            stream = f"{stream[:start]}{json.dumps(text, ensure_ascii=False)}{stream[end:]}"
    return stream


def _is_lost(node: yaml.ScalarNode, wanted: bool, listed: bool) -> bool:
    """Whether YAML would make something else of a text."""
    if node.tag in (_STR, _MERGE):
        return False
    odd = node.tag == _INT and not _PLAIN_INTEGER.fullmatch(node.value)
    return wanted or odd or (listed and node.tag == _NULL)


def _scalars(node: yaml.Node, wanted: bool, seen: set[int]) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """All scalars, and whether a text is wanted there."""
    if isinstance(node, yaml.ScalarNode):
        yield node, wanted
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _scalars(entry, wanted, seen)
        return
    keys: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys and key.tag != _MERGE:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice in one mapping", problem_mark=key.start_mark
                )
            keys.add(key.value)
            yield key, True
        inside = isinstance(key, yaml.ScalarNode) and key.value in TEXTS and not isinstance(value, yaml.ScalarNode)
        yield from _scalars(value, wanted or inside, seen)
