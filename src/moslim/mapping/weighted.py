"""Another mapping's rewards, some dimensions counting more than others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.mapping.base import MappingFunction
from moslim.plugin import Plugin
from moslim.preferences import INACTIVE, PreferenceSet


class Weighted(MappingFunction):
    """``sum_d w_d r_d / sum_d w_d`` over the dimensions that a prompt names, with another mapping's rewards ``r_d``.

    A policy optimizer with ``normalize_then_sum`` weighs the normalised rewards so, whatever their scales (GDPO, arXiv
    2601.05242, with weights). A weight may depend on the level asked for, and so differs between the answers of a
    batch: where it matters most that answers are harmless, ``{harm: [4, 1]}`` insists on requests for the lowest level.

    Args:
        objective: What rewards each dimension. Its scalar must be a mean, see :attr:`is_mean`.
        weights: By dimension name: a number, or one per requested level; 1 for those not named.

    Raises:
        UsageError: A weight is not above 0, or the objective makes a scalar of its own.
    """

    def __init__(self, objective: MappingFunction, weights: Mapping[str, float | list[float]]) -> None:
        if not objective.is_mean:
            raise UsageError(f"{type(objective).__name__} makes a scalar of its own, which Weighted would not follow")
        for name, own in weights.items():
            if min(own if isinstance(own, list) else [own], default=0.0) <= 0:
                raise UsageError(f"the weight of '{name}' is {own}: give a number above 0, or one per level")
        self.objective = objective
        self.by_name = dict(weights)

    @property
    def children(self) -> Sequence[Plugin]:
        """The objective: its hooks are called and its state is saved, too."""
        return (self.objective,)

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: ``weights`` names an unknown dimension.
            UsageError: A dimension has not as many levels as weights.
        """
        super().bind(preferences)
        self.objective.bind(preferences)
        for name, own in self.by_name.items():
            levels = preferences[name].levels
            if isinstance(own, list) and len(own) != len(levels):
                raise UsageError(
                    f"'{name}' has {len(levels)} levels, but {len(own)} weights: give one number per level"
                )

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Lets the objective observe."""
        self.objective.observe(probs, targets)

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """The objective's rewards."""
        return self.objective.per_dimension(probs, targets, groups)

    def weights(self, targets: Tensor) -> Tensor:
        """Those of the requested levels, times the objective's own."""
        found = self.objective.weights(targets)
        factors = torch.ones_like(found)
        for column, name in enumerate(self.preferences.names):
            own = self.by_name.get(name, 1.0)
            table = found.new_tensor(own if isinstance(own, list) else [own] * self.preferences.sizes[column])
            factors[:, column] = table[targets[:, column].clamp(min=0)]
        return found * factors.masked_fill(targets == INACTIVE, 1.0)
