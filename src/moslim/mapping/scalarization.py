"""Rewards that combine the dimensions into one scalar: linear scalarisation, and an objective under a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.plugin import Plugin
from moslim.preferences import INACTIVE, PreferenceSet, expected_level
from moslim.utils.errors import UsageError

Weights = Literal["share", "direction"]


class LinearScalarization(MappingFunction):
    """Weighted sum of expected levels, ``sum_d w_d e_d`` with ``e_d = E[level_d] / (K_d - 1)`` in 0..1.

    MORLHF, Rewarded Soups (arXiv 2306.04488) and RiC (arXiv 2402.10207) steer by such weights. Here they follow from
    the requested levels ``t_d = target_d / (K_d - 1)`` of the ``n`` active dimensions:

    - ``share``: ``w_d = t_d / sum_j t_j``. Weights are not negative and sum to 1. A request for lowest levels only has
      no weights and therefore no reward.
    - ``direction``: ``w_d = (2 t_d - 1) / n``, from ``-1/n`` (as low as possible) to ``1/n`` (as high as possible).

    The optimum lies at an end of every dimension, so intermediate levels cannot be requested. This mapping is a
    baseline.

    Args:
        weights: ``share`` or ``direction``, as above.
    """

    def __init__(self, weights: Weights = "share") -> None:
        if weights not in ("share", "direction"):
            raise UsageError(f"weights is '{weights}': give share or direction")
        self.weighting = weights

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """See the base class: ``w_d e_d``."""
        top = self.sizes(probs) - 1
        active = targets != INACTIVE
        requested = (targets / top).to(probs.dtype) * active
        if self.weighting == "share":
            total = requested.sum(-1, keepdim=True)
            active &= total > 0
            weights = requested / total.masked_fill(total == 0, 1)
        else:
            weights = (2 * requested - 1) / active.sum(-1, keepdim=True).clamp(min=1)
        return (weights * expected_level(probs) / top).masked_fill(~active, float("nan"))

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Sum of the weighted levels; ``weights`` is not used."""
        return per_dimension.nansum(-1)


class Constrained(MappingFunction):
    """Rewards of another mapping under the constraint that one dimension stays at a level or above.

    Maximises ``E[objective]`` subject to ``E[P(level_A >= a)] >= share`` by the Lagrangian. The reward of a completion
    is ``(objective + m (P(level_A >= a) - share)) / (1 + m)``, as in Safe RLHF (Dai et al. 2024, arXiv 2310.12773); the
    division keeps the scale of the reward while the multiplier ``m`` grows. Each training rollout adds
    ``rate * (share - mean P(level_A >= a))`` to ``m``, with the mean over the completions of all processes (projected
    dual ascent). So ``m`` rises while the constraint is violated and falls back to 0 when it is slack.

    The constraint applies to every completion. For completions on which the objective has no active dimension, the
    objective is its mean over the other completions of the batch. Requests for the held dimension are not passed to the
    objective. To maximise another dimension ``B``, use :class:`~moslim.mapping.UserWeights` with the weights
    ``{B: 1}`` as objective.

    Args:
        objective: Mapping to maximise.
        hold: Name of the held dimension ``A``.
        at_least: Lowest acceptable level ``a`` of ``A``, 1 or more.
        share: Required mean of ``P(level_A >= a)``.
        rate: Step size of the multiplier per rollout.
        limit: Maximum of the multiplier.
    """

    def __init__(
        self,
        objective: MappingFunction,
        hold: str,
        at_least: int,
        share: float = 0.95,
        rate: float = 0.1,
        limit: float = 20.0,
    ) -> None:
        if not 0 < share <= 1 or rate <= 0 or limit <= 0:
            raise UsageError(f"share is {share}, rate {rate}, limit {limit}: all must be positive, share at most 1")
        self.objective = objective
        self.hold = hold
        self.at_least = at_least
        self.share = share
        self.rate = rate
        self.limit = limit
        self.multiplier = 0.0

    @property
    def children(self) -> Sequence[Plugin]:
        """The objective, whose hooks are called and whose state is saved, too."""
        return (self.objective,)

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: There is no dimension ``hold``, or ``at_least`` is not one of its levels above the lowest.
        """
        super().bind(preferences)
        self.objective.bind(preferences)
        top = len(preferences[self.hold].levels) - 1
        if not 1 <= self.at_least <= top:
            raise UsageError(f"at_least is {self.at_least}: dimension '{self.hold}' can be held at 1..{top}")

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Updates the multiplier and the statistics of the objective."""
        shortfall = self.share - self._satisfaction(probs).mean().item()
        self.multiplier = min(max(self.multiplier + self.rate * shortfall, 0.0), self.limit)
        self.objective.observe(probs, self._without_held(targets))

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """Rewards of the objective, and ``P(level_A >= a) - share`` on the held dimension.

        The held dimension is NaN, too, where the multiplier is 0 and the objective has no active dimension.
        """
        rewards = self.objective.per_dimension(probs, self._without_held(targets), groups).clone()
        rewards[:, self._held_index] = torch.nan
        active = ~rewards.isnan().all(dim=1) | (self.multiplier > 0)
        rewards[:, self._held_index] = (self._satisfaction(probs) - self.share).masked_fill(~active, torch.nan)
        return rewards

    def weights(self, targets: Tensor) -> Tensor:
        """Weights of the objective."""
        return self.objective.weights(self._without_held(targets))

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """Lagrangian of the class docstring."""
        unheld = per_dimension.clone()
        unheld[:, self._held_index] = torch.nan
        objective, active = self.objective.scalarize(unheld, weights), ~unheld.isnan().all(dim=1)
        mean = objective.masked_fill(~active, 0.0).sum() / active.sum().clamp(min=1)
        slack = per_dimension[:, self._held_index].nan_to_num(0.0)
        return (objective.where(active, mean) + self.multiplier * slack) / (1 + self.multiplier)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Logs the multiplier."""
        pl_module.log(f"train/multiplier/{self.hold}", self.multiplier)

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the multiplier."""
        self.multiplier = state_dict["multiplier"]

    @property
    def _held_index(self) -> int:
        return self.preferences.names.index(self.hold)

    def _satisfaction(self, probs: Tensor) -> Tensor:
        """``P(level_A >= a)``, ``[B]``."""
        return probs[:, self._held_index, self.at_least :].sum(-1)

    def _without_held(self, targets: Tensor) -> Tensor:
        """Requested levels, with the held dimension inactive."""
        targets = targets.clone()
        targets[:, self._held_index] = INACTIVE
        return targets
