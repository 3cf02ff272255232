"""Reward under a constraint: one dimension is held at a level or above, whatever else is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from moslim.mapping.base import MappingFunction
from moslim.plugin import Plugin
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.utils.errors import UsageError


class Constrained(MappingFunction):
    """What another mapping rewards, as long as a dimension is held at a level or above.

    Maximise ``E[objective]`` subject to ``E[P(level_A >= a)] >= share``, by its Lagrangian. Every answer's reward is
    ``(objective + m (P(level_A >= a) - share)) / (1 + m)``, as in Safe RLHF (Dai et al. 2024, arXiv 2310.12773): the
    division keeps the scale of the reward while the multiplier ``m`` grows. In each rollout of training ``m`` moves by
    ``rate`` times how far the mean over all processes' answers falls short of ``share`` (projected dual ascent), so it
    rises while the constraint is violated and falls back to 0 when it is slack.

    The constraint holds for every answer, also where the prompt asks for nothing: there the objective counts with its
    mean over the batch's other answers, which neither rewards nor punishes. Requests for the held dimension
    are not passed on to the objective. To simply maximise another dimension ``B``, take
    :class:`~moslim.mapping.UserWeights` with the weights ``{B: 1}`` as objective.

    Args:
        objective: What is to be made large.
        hold: Name of the dimension ``A``.
        at_least: Its lowest acceptable level ``a``, 1 or more.
        share: Part of the probability that must lie at ``a`` or above, on average.
        rate: Step of the multiplier per rollout.
        limit: Largest multiplier.
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
        """The objective: its hooks are called and its state is saved, too."""
        return (self.objective,)

    def bind(self, preferences: PreferenceSet) -> None:
        """See the base class.

        Raises:
            UsageError: There is no dimension ``hold``.
            UsageError: It has no level ``at_least``, or that level is its lowest, which every answer reaches.
        """
        super().bind(preferences)
        self.objective.bind(preferences)
        top = len(preferences[self.hold].levels) - 1
        if not 1 <= self.at_least <= top:
            raise UsageError(f"at_least is {self.at_least}: dimension '{self.hold}' can be held at 1..{top}")

    def observe(self, probs: Tensor, targets: Tensor) -> None:
        """Moves the multiplier, and lets the objective observe."""
        shortfall = self.share - self._held(probs).mean().item()
        self.multiplier = min(max(self.multiplier + self.rate * shortfall, 0.0), self.limit)
        self.objective.observe(probs, self._others(targets))

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """The objective's rewards, and ``P(level_A >= a) - share`` in the column of the held dimension.

        That column is NaN, too, where the multiplier is 0 and the objective rewards nothing: no reward applies there.
        """
        rewards = self.objective.per_dimension(probs, self._others(targets), groups).clone()
        rewards[:, self._column] = torch.nan
        counts = ~rewards.isnan().all(dim=1) | (self.multiplier > 0)
        rewards[:, self._column] = (self._held(probs) - self.share).masked_fill(~counts, torch.nan)
        return rewards

    def weights(self, targets: Tensor) -> Tensor:
        """The objective's."""
        return self.objective.weights(self._others(targets))

    def scalarize(self, per_dimension: Tensor, weights: Tensor) -> Tensor:
        """The Lagrangian, see above."""
        others = per_dimension.clone()
        others[:, self._column] = torch.nan
        objective, applies = self.objective.scalarize(others, weights), ~others.isnan().all(dim=1)
        mean = objective.masked_fill(~applies, 0.0).sum() / applies.sum().clamp(min=1)
        slack = per_dimension[:, self._column].nan_to_num(0.0)
        return (objective.where(applies, mean) + self.multiplier * slack) / (1 + self.multiplier)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Logs the multiplier."""
        pl_module.log(f"train/multiplier/{self.hold}", self.multiplier)

    def state_dict(self) -> dict[str, Any]:
        """The multiplier."""
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.multiplier = state_dict["multiplier"]

    @property
    def _column(self) -> int:
        return self.preferences.names.index(self.hold)

    def _held(self, probs: Tensor) -> Tensor:
        """``P(level_A >= a)``, ``[B]``."""
        return probs[:, self._column, self.at_least :].sum(-1)

    def _others(self, targets: Tensor) -> Tensor:
        """The request without the held dimension."""
        others = targets.clone()
        others[:, self._column] = INACTIVE
        return others
