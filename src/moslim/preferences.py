"""Preference dimensions, requests for their levels, and measures of level distributions."""

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
"""Names used by metrics and reports; no dimension can have them."""


@dataclass(frozen=True)
class Dimension:
    """A preference axis and its ordered levels.

    Names are written into prompts: they are printable, without ``[[``, ``]]`` or surrounding white space. Names that
    differ only in case, width or white space count as equal.

    Args:
        name: Name of the axis, e.g. ``helpfulness``. It is part of the names of metrics, weights and columns: no ``/``
            or ``.``, and none of :data:`RESERVED_NAMES`.
        levels: Names of the levels, lowest first; at least two, all different.

    Raises:
        UsageError: A name or the list of levels is invalid.
    """

    name: str
    levels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise UsageError(f"dimension '{self.name}' has levels {list(self.levels)}: give at least two")
        if len(set(self.levels)) != len(self.levels):
            raise UsageError(f"dimension '{self.name}' names a level twice: {list(self.levels)}; rename one of them")
        _check_name(self.name, f"name {quoted(self.name)} of a dimension")
        if set(self.name) & {"/", "."}:
            raise UsageError(
                f"dimension '{self.name}': the name becomes part of the names of metrics and weights, so it cannot "
                "contain '/' or '.'; rename the dimension"
            )
        if self.name in RESERVED_NAMES:
            raise UsageError(
                f"dimension '{self.name}': metrics have this name already; rename the dimension, e.g. "
                f"'{self.name}_level'"
            )
        for level in self.levels:
            _check_name(level, f"level {quoted(level)} of dimension '{self.name}'")
        _refuse_equal(self.levels, f"dimension '{self.name}': levels")

    def number(self, level: int | str) -> int:
        """Returns the index of a level (0 = lowest), given its name or its index.

        If the names of levels are numbers, e.g. 1 to 5, a number is always read as a name.

        Raises:
            UsageError: The level does not exist; the message lists the levels.
        """
        text = str(level).strip()
        if text in self.levels:
            return self.levels.index(text)
        names_only = any(map(_is_number, self.levels))
        if not names_only and _is_number(text) and 0 <= int(text) < len(self.levels):
            return int(text)
        choices = ", ".join(name if names_only else f"{name} ({i})" for i, name in enumerate(self.levels))
        raise UsageError(f"dimension '{self.name}' has no level '{text}'; lowest first, there are: {choices}")


@dataclass(frozen=True)
class Preference:
    """Requested levels of one prompt: dimension name to level (0 = lowest). An absent dimension is inactive."""

    levels: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.levels)

    def __hash__(self) -> int:
        return hash(frozenset(self.levels.items()))


class PreferenceSet:
    """Ordered dimensions, shared by a classifier, a policy and a data module.

    Args:
        dimensions: Dimension name to the names of its levels, lowest first. Every ``[..., D]`` tensor follows this
            order. An integer as a name is read as its digits.

    Raises:
        UsageError: There are no dimensions, or a name is invalid or occurs twice.
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
        """Returns the preference for levels given by name or index; see :meth:`Dimension.number`.

        Raises:
            UsageError: A dimension or level does not exist.
        """
        return Preference({name: self[name].number(level) for name, level in levels.items()})

    def to_dict(self) -> dict[str, list[str]]:
        """Returns the argument of the constructor as plain data."""
        return {d.name: list(d.levels) for d in self.dimensions}

    def check(self, preference: Preference) -> None:
        """Checks that every dimension and level of a preference exists.

        Raises:
            UsageError: A dimension is unknown or lacks the level.
        """
        for name, level in preference.levels.items():
            size = len(self[name].levels)
            if not 0 <= level < size:
                raise UsageError(f"level {level} of dimension '{name}' is outside 0..{size - 1}")

    def encode(self, preference: Preference) -> Tensor:
        """Returns the target ``[D]`` (int64) of a preference; ``INACTIVE`` for dimensions that are not requested.

        Raises:
            UsageError: See :meth:`check`.
        """
        self.check(preference)
        return torch.tensor([preference.levels.get(name, INACTIVE) for name in self.names], dtype=torch.long)

    def decode(self, target: Tensor) -> Preference:
        """Returns the preference of a target; the inverse of :meth:`encode`."""
        levels = zip(self.names, target.tolist(), strict=True)
        return Preference({name: level for name, level in levels if level != INACTIVE})

    def columns_in(self, other: PreferenceSet, owner: str) -> list[int]:
        """Returns the positions of these dimensions in ``other``, matched by name; ``other`` may have more.

        Args:
            other: Dimensions to look in, e.g. those of the classifier's heads.
            owner: Name of the object that has ``other``, for the error message.

        Raises:
            UsageError: ``other`` lacks a dimension, or gives its levels other names or another order.
        """
        for dimension in self.dimensions:
            if dimension.name not in other.names:
                raise UsageError(
                    f"dimension '{dimension.name}' is unknown to the {owner}, which has: {', '.join(other.names)}"
                )
            levels, other_levels = list(dimension.levels), list(other[dimension.name].levels)
            if levels != other_levels:
                raise UsageError(
                    f"dimension '{dimension.name}' has the levels {levels} in `preferences`, but {other_levels} in the "
                    f"{owner}: a level is known by its place, lowest first, so another name or order means something "
                    f"else; give those of the {owner}"
                )
        return [other.names.index(name) for name in self.names]


def _level_names(name: str, levels: Sequence[Scalar]) -> tuple[str, ...]:
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise UsageError(f"preferences.dimensions.{name}: {quoted(levels)} is not a list: give a list of level names")
    return tuple(as_text(level, f"preferences.dimensions.{name}") for level in levels)


def _check_name(name: str, label: str) -> None:
    """Checks that a name can be written into prompts; ``label`` starts the error message."""
    if not name.strip():
        raise UsageError(f"{label} is empty: give a name")
    if name != name.strip() or not name.isprintable():
        raise UsageError(f"{label} has surrounding white space, line ends or invisible characters: remove them")
    if "[[" in name or "]]" in name or name.startswith("[") or name.endswith("]"):
        raise UsageError(f"{label} has brackets, which delimit levels in prompts: remove them")


def _refuse_equal(names: Sequence[str], label: str) -> None:
    """Raises an error if two names differ only in case, width or white space; ``label`` starts the message."""
    by_key: dict[str, str] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if key in by_key:
            raise UsageError(f"{label} {by_key[key]!r} and {name!r} differ in case or white space only: rename one")
        by_key[key] = name


def _is_number(text: str) -> bool:
    """Whether a text is an integer in ASCII digits."""
    return bool(re.fullmatch(r"-?[0-9]+", text))


def expected_level(probs: Tensor) -> Tensor:
    """Returns the mean of each level distribution, ``sum_k k p_k``: ``[..., K]`` to ``[...]``, in levels."""
    probs = widened(probs)  # summed, since autocast would round a matrix product
    return (probs * torch.arange(probs.shape[-1], device=probs.device)).sum(-1)


def expected_distance(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns the expected distance from the requested level, ``sum_k p_k |k - target|``.

    Args:
        probs: ``[B, D, K]``, 0 on levels that a dimension lacks.
        targets: ``[B, D]`` int64, requested level, -1 = not requested.

    Returns:
        ``[B, D]``, in levels; NaN where no level is requested.
    """
    probs = widened(probs)
    levels = torch.arange(probs.shape[-1], device=probs.device)
    distance = (levels - targets[..., None]).abs().to(probs.dtype)
    return (probs * distance).sum(-1).masked_fill(targets == INACTIVE, torch.nan)


def requested_probability(probs: Tensor, targets: Tensor) -> Tensor:
    """Returns the probability of the requested level, ``[B, D]``; NaN where no level is requested.

    Args:
        probs: ``[B, D, K]``, 0 on levels that a dimension lacks.
        targets: ``[B, D]`` int64, requested level, -1 = not requested.
    """
    requested = widened(probs).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return requested.masked_fill(targets == INACTIVE, torch.nan)
