"""Preference dimensions, their levels, and requests for levels.

What can be asked of a policy: dimensions, their levels, and a request for some of them.

Level probabilities as numbers: where a distribution lies, and how far it is from a request.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moslim.ops.numerics import widened
from moslim.utils.errors import Scalar, UsageError, as_text, quoted

INACTIVE = -1
"""Entry of a target tensor for a dimension that the prompt does not mention."""


RESERVED_NAMES = (
    *("base", "best_of", "calibration", "default", "mean", "pairs", "requests", "reward", "seen", "subsets", "sweep"),
    *("total", "unseen", "weighted"),
)
"""Names of metrics and of parts of reports, which no dimension can have."""


@dataclass(frozen=True)
class Dimension:
    """One preference axis.

    Args:
        name: Name of the axis, e.g. ``helpfulness``. It is part of the names of metrics, weights and columns, so it
            has no ``/`` or ``.``, and is none of :data:`RESERVED_NAMES`.
        levels: Names of its intensity levels, from the lowest to the highest; at least two, all different.

    Names are printable, without ``[[``, ``]]`` or white space around them, since prompts hold them; names that differ
    in case, width or white space only count as equal.

    Raises:
        UsageError: A name or the list of levels is otherwise.
    """

    name: str
    levels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise UsageError(f"dimension '{self.name}' has levels {list(self.levels)}: give at least two")
        if len(set(self.levels)) != len(self.levels):
            raise UsageError(f"dimension '{self.name}' names a level twice: {list(self.levels)}")
        _check_name(self.name, f"name of a dimension {quoted(self.name)}")
        if set(self.name) & {"/", "."}:
            raise UsageError(
                f"dimension '{self.name}': no '/' or '.' can be in the name, as metrics and weights have it"
            )
        if self.name in RESERVED_NAMES:
            raise UsageError(
                f"dimension '{self.name}': metrics have this name already; call it otherwise, e.g. '{self.name}_level'"
            )
        for level in self.levels:
            _check_name(level, f"level {quoted(level)} of dimension '{self.name}'")
        _refuse_equal(self.levels, f"dimension '{self.name}': levels")

    def number(self, asked: int | str) -> int:
        """Returns the number of a level (0 = lowest) that is asked for by its name, or by that number.

        Where names of levels are numbers themselves, as with 1 to 5, a number is always a name.

        Raises:
            UsageError: There is no such level; the message lists those there are.
        """
        text = str(asked).strip()
        if text in self.levels:
            return self.levels.index(text)
        by_name = any(_is_number(level) for level in self.levels)
        if not by_name and _is_number(text) and 0 <= int(text) < len(self.levels):
            return int(text)
        known = ", ".join(level if by_name else f"{level} ({i})" for i, level in enumerate(self.levels))
        raise UsageError(f"dimension '{self.name}' has no level '{text}'; lowest first, there are: {known}")


@dataclass(frozen=True)
class Preference:
    """The levels asked for in one prompt: dimension name to level (0 = lowest). Absent means inactive."""

    levels: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.levels)

    def __hash__(self) -> int:
        return hash(frozenset(self.levels.items()))


class PreferenceSet:
    """The ordered dimensions that a classifier, a policy and a data module share.

    Args:
        dimensions: Dimension name to the names of its levels, lowest first. The order is kept and is the
            order of every ``[.., D]`` tensor in the project. A whole number as a name is its digits.
    """

    def __init__(self, dimensions: Mapping[str, Sequence[Scalar]]) -> None:
        if not dimensions:
            raise UsageError("preferences.dimensions is empty: name at least one dimension with its levels")
        self.dimensions = tuple(
            Dimension(as_text(name, "preferences.dimensions"), _level_names(name, levels))
            for name, levels in dimensions.items()
        )
        _refuse_equal(self.names, "preferences: dimensions")

    @property
    def names(self) -> tuple[str, ...]:
        """Dimension names, in order."""
        return tuple(d.name for d in self.dimensions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of levels of each dimension, in order."""
        return tuple(len(d.levels) for d in self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PreferenceSet) and self.dimensions == other.dimensions

    def __hash__(self) -> int:
        return hash(self.dimensions)

    def __getitem__(self, name: str) -> Dimension:
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise UsageError(f"no dimension '{name}'; there are: {', '.join(self.names)}")

    def requested(self, levels: Mapping[str, int | str]) -> Preference:
        """Returns the preference that asks for levels by name or number; see :meth:`Dimension.number`.

        Raises:
            UsageError: There is no such dimension or level.
        """
        return Preference({name: self[name].number(asked) for name, asked in levels.items()})

    def to_dict(self) -> dict[str, list[str]]:
        """The constructor's argument, as plain data."""
        return {d.name: list(d.levels) for d in self.dimensions}

    def check(self, preference: Preference) -> None:
        """Refuses a preference for what does not exist.

        Raises:
            UsageError: It names an unknown dimension, or asks for a level that the dimension does not have.
        """
        for name, level in preference.levels.items():
            size = len(self[name].levels)
            if not 0 <= level < size:
                raise UsageError(f"level {level} of dimension '{name}' is outside 0..{size - 1}")

    def encode(self, preference: Preference) -> Tensor:
        """Returns the targets ``[D]`` (int64) of a preference; ``INACTIVE`` where it asks for nothing.

        Raises:
            UsageError: See :meth:`check`.
        """
        self.check(preference)
        return torch.tensor([preference.levels.get(name, INACTIVE) for name in self.names], dtype=torch.long)

    def decode(self, target: Tensor) -> Preference:
        """Inverse of :meth:`encode`."""
        pairs = zip(self.names, target.tolist(), strict=True)
        return Preference({name: level for name, level in pairs if level != INACTIVE})

    def columns_in(self, other: PreferenceSet, owner: str) -> list[int]:
        """Positions of these dimensions in ``other``, matched by name; ``other`` may have more.

        Args:
            other: The set to look in, e.g. the classifier's heads.
            owner: What ``other`` belongs to, for the error message.

        Raises:
            UsageError: A dimension is missing in ``other``, or its levels have other names or another order there.
        """
        for dimension in self.dimensions:
            if dimension.name not in other.names:
                raise UsageError(
                    f"dimension '{dimension.name}' is unknown to the {owner}, which has: {', '.join(other.names)}"
                )
            ours, theirs = list(dimension.levels), list(other[dimension.name].levels)
            if theirs != ours:
                raise UsageError(
                    f"dimension '{dimension.name}' has the levels {ours} in `preferences`, but {theirs} in the "
                    f"{owner}: a level is known by its place, lowest first, so another name or order means something "
                    f"else; give those of the {owner}"
                )
        return [other.names.index(name) for name in self.names]


def _level_names(name: str, levels: Sequence[Scalar]) -> tuple[str, ...]:
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise UsageError(f"preferences.dimensions.{name}: {quoted(levels)} is no list: give a list of level names")
    return tuple(as_text(level, f"preferences.dimensions.{name}") for level in levels)


def _check_name(name: str, what: str) -> None:
    if not name.strip():
        raise UsageError(f"{what}: it is empty")
    if name != name.strip() or not name.isprintable():
        raise UsageError(f"{what}: white space around it, line ends and invisible characters cannot be in a name")
    if "[[" in name or "]]" in name or name.startswith("[") or name.endswith("]"):
        raise UsageError(f"{what}: it holds brackets, which delimit levels in prompts; write it without")


def _refuse_equal(names: Sequence[str], what: str) -> None:
    """Raises an error if two names differ in case, width or white space only."""
    known: dict[str, str] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if key in known:
            raise UsageError(f"{what} {known[key]!r} and {name!r} differ in case or white space only: rename one")
        known[key] = name


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[0-9]+", text))


def expected_level(probs: Tensor) -> Tensor:
    """Mean of each level distribution, ``sum_k k p_k``: ``[..., K]`` to ``[...]``, in levels."""
    probs = widened(probs)  # a sum, no matrix product, which autocast would round
    return (probs * torch.arange(probs.shape[-1], device=probs.device)).sum(-1)


def expected_distance(probs: Tensor, targets: Tensor) -> Tensor:
    """Expected distance from the requested level, ``sum_k p_k |k - target|``.

    Args:
        probs: ``[B, D, K]``, 0 on levels that a dimension lacks.
        targets: ``[B, D]`` int64, requested level, -1 where none was.

    Returns:
        ``[B, D]``, in levels; NaN where none was requested.
    """
    probs = widened(probs)
    levels = torch.arange(probs.shape[-1], device=probs.device)
    distance = (levels - targets[..., None]).abs().to(probs.dtype)
    return (probs * distance).sum(-1).masked_fill(targets == INACTIVE, torch.nan)


def requested_probability(probs: Tensor, targets: Tensor) -> Tensor:
    """Probability of the requested level: ``[B, D, K]`` and ``[B, D]`` to ``[B, D]``, NaN where none was requested."""
    picked = widened(probs).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(targets == INACTIVE, torch.nan)
