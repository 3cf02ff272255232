"""What mapping functions and policy optimizers have in common: they are Lightning callbacks with a role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Protocol

from lightning.pytorch import Callback

from moslim.training.identity import class_key
from moslim.utils.errors import UsageError


class Plugin(Callback):
    """A pluggable part whose hooks the Trainer calls and whose state goes into every checkpoint.

    State is plain numbers, lists and dicts, returned by ``state_dict``: checkpoints load with ``weights_only``.
    """

    role: ClassVar[str]
    """What the part is for; a run has one part per role."""

    place: str = ""
    """Position inside the parts that contain this one, e.g. ``.1``; empty for the part that the config names."""

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: role, place and class, so that another class is noticed."""
        return f"{self.role}{self.place}:{class_key(type(self))}"

    @property
    def children(self) -> Sequence[Plugin]:
        """The parts that this one is made of; a composite overrides it, and their state is saved with its own."""
        return ()


def own_parts(plugins: Iterable[Plugin]) -> list[Plugin]:
    """All parts, those inside of others after them, each with its place set.

    Raises:
        UsageError: One and the same part stands in two places, where its state could not be told apart.
    """
    parts = _placed(plugins)
    for i, part in enumerate(parts):
        if any(part is earlier for earlier in parts[:i]):
            raise UsageError(
                f"the same {type(part).__name__} stands in two places of the model's {part.role}: its hooks would run "
                "twice and its state would be saved once; make two of them"
            )
    return parts


def _placed(plugins: Iterable[Plugin]) -> list[Plugin]:
    parts: list[Plugin] = []
    for plugin in plugins:
        parts.append(plugin)
        for index, child in enumerate(plugin.children):
            child.place = f"{plugin.place}.{index}"
        parts += _placed(plugin.children)
    return parts


class Stateful(Protocol):
    """A part of a run whose state goes into checkpoints; empty where it has none."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@contextmanager
def unchanged_on_failure(parts: Sequence[Stateful]) -> Iterator[None]:
    """Gives the parts their state back if what is inside fails or is interrupted, so that it can be done again."""
    before = [deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except BaseException:
        for part, state in zip(parts, before, strict=True):
            if state:
                part.load_state_dict(state)
        raise


def own_callbacks(plugins: Iterable[Plugin], configured: Iterable[Callback]) -> list[Callback]:
    """The parts as callbacks for ``configure_callbacks``.

    Args:
        plugins: The parts that the config names.
        configured: ``trainer.callbacks``.

    Raises:
        UsageError: A part's type, or one that it is derived from, is also in ``configured``, where Lightning would
            silently replace one by the other.
    """
    parts = own_parts(plugins)
    for callback in configured:
        own = type(callback)
        twin = next((part for part in parts if own is not Callback and isinstance(part, own)), None)
        if twin is not None and callback not in parts:  # after a first run, `configured` holds the parts themselves
            raise UsageError(
                f"trainer.callbacks lists a {type(callback).__name__}, which is also the model's {twin.role}: "
                "remove it from trainer.callbacks"
            )
    return list(parts)
