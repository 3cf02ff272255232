"""What mapping functions and policy optimizers have in common: they are Lightning callbacks with a role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import ClassVar

from lightning.pytorch import Callback


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
        """Key of the state in a checkpoint: role, place and full class path, so that another class is noticed."""
        return f"{self.role}{self.place}:{type(self).__module__}.{type(self).__qualname__}"

    @property
    def children(self) -> Sequence[Plugin]:
        """The parts that this one is made of; a composite overrides it, and their state is saved with its own."""
        return ()


def own_parts(plugins: Iterable[Plugin]) -> list[Plugin]:
    """All parts, those inside of others after them, each with its place set."""
    parts: list[Plugin] = []
    for plugin in plugins:
        parts.append(plugin)
        for index, child in enumerate(plugin.children):
            child.place = f"{plugin.place}.{index}"
        parts += own_parts(plugin.children)
    return parts


@contextmanager
def unchanged_on_failure(plugins: Iterable[Plugin]) -> Iterator[None]:
    """Gives the parts their state back if what is inside fails or is interrupted, so that it can be done again."""
    parts = own_parts(plugins)
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
        ValueError: A part's type, or one that it is derived from, is also in ``configured``, where Lightning would
            silently replace one by the other.
    """
    parts = own_parts(plugins)
    for callback in configured:
        own = type(callback)
        twin = next((part for part in parts if own is not Callback and isinstance(part, own)), None)
        if twin is not None and callback not in parts:  # after a first run, `configured` holds the parts themselves
            raise ValueError(
                f"trainer.callbacks lists a {type(callback).__name__}, which is also the model's {twin.role}: "
                "remove it from trainer.callbacks"
            )
    return list(parts)
