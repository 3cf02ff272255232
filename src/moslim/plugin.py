"""Base class of mapping functions and policy optimizers: Lightning callbacks with a role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Protocol

from lightning.pytorch import Callback

from moslim.training.identity import class_key
from moslim.utils.errors import UsageError


class Plugin(Callback):
    """A replaceable part of a module. The Trainer calls its hooks and saves its state in every checkpoint.

    ``state_dict`` returns plain numbers, lists and dicts, since checkpoints are loaded with ``weights_only``.
    """

    role: ClassVar[str]
    """Purpose of the part; a run has one part per role."""

    place: str = ""
    """Position in the parts that contain this one, e.g. ``.1``; empty for the part that the config names."""

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: role, place and class, so that another class does not load it."""
        return f"{self.role}{self.place}:{class_key(type(self))}"

    @property
    def children(self) -> Sequence[Plugin]:
        """Parts of a composite, which overrides this; each part's state is saved under its own key."""
        return ()


def all_parts(plugins: Iterable[Plugin]) -> list[Plugin]:
    """Returns plugins and their children, each parent before its children, and sets the places of the children.

    Raises:
        UsageError: The same instance occurs twice.
    """
    parts = _with_children(plugins)
    for i, part in enumerate(parts):
        if any(part is earlier for earlier in parts[:i]):
            raise UsageError(
                f"the same {type(part).__name__} instance occurs twice in the model's {part.role}: its hooks would run "
                "twice and its state would be saved once; create two instances"
            )
    return parts


def _with_children(plugins: Iterable[Plugin]) -> list[Plugin]:
    parts: list[Plugin] = []
    for plugin in plugins:
        parts.append(plugin)
        for index, child in enumerate(plugin.children):
            child.place = f"{plugin.place}.{index}"
        parts += _with_children(plugin.children)
    return parts


class Stateful(Protocol):
    """Object whose state is saved in checkpoints; the state may be empty."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@contextmanager
def unchanged_on_failure(parts: Sequence[Stateful]) -> Iterator[None]:
    """Context manager that restores the state of the parts if its block raises, so that the block can be repeated."""
    states = [deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except BaseException:
        for part, state in zip(parts, states, strict=True):
            if state:
                part.load_state_dict(state)
        raise


def part_callbacks(plugins: Iterable[Plugin], configured: Iterable[Callback]) -> list[Callback]:
    """Returns plugins and their children as callbacks for ``configure_callbacks``.

    Args:
        plugins: Parts that the config names.
        configured: ``trainer.callbacks``.

    Raises:
        UsageError: ``configured`` has a callback of the type, or a base type, of a part, so that Lightning would
            silently replace one with the other.
    """
    parts = all_parts(plugins)
    for callback in configured:
        callback_type = type(callback)
        if callback_type is Callback or callback in parts:  # after a first run, `configured` holds the parts themselves
            continue
        duplicate = next((part for part in parts if isinstance(part, callback_type)), None)
        if duplicate is not None:
            raise UsageError(
                f"trainer.callbacks lists a {callback_type.__name__}, which is also the model's {duplicate.role}: "
                "remove it from trainer.callbacks"
            )
    return list(parts)
