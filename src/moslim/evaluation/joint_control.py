"""Analysis of requests for several levels at once: which of them fail, and whether policy or classifier is at fault.

Shapes: ``N`` answers to such requests, ``D`` dimensions of at most ``K`` levels. An answer is *met* on a dimension if
the judged level is the requested one, and met as a whole if that holds for all requested dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moslim.preferences import INACTIVE, PreferenceSet
from moslim.utils.files import Result

if TYPE_CHECKING:
    from moslim.evaluation.steerability import Records, SweepGrid

DISTANCE_GROUPS = 3
"""Number of groups of equal size by distance from single requests."""


@dataclass
class JointRequests:
    """Answers to requests for several levels, without those that the judge left out.

    Args:
        targets: ``[N, D]`` int64 requested levels, -1 = not requested.
        error: ``[N, D]`` float64 absolute error in levels, 0 where not requested.
        predicted: ``[N, D]`` int64 most probable levels by the training classifier.
        judged: ``[N, D]`` int64 judged levels, rounded; -1 where there is none.
    """

    targets: Tensor
    error: Tensor
    predicted: Tensor
    judged: Tensor

    @classmethod
    def of(cls, records: Records) -> JointRequests:
        """Selects the answers whose requested dimensions were all judged."""
        requested = records.targets != INACTIVE
        error = (records.achieved.double() - records.targets).abs()
        rows = (~error.isnan() | ~requested).all(dim=1)
        judged = records.achieved.double().round().nan_to_num(-1.0).long()
        return cls(
            records.targets[rows],
            error.where(requested, 0.0)[rows],
            records.probs.argmax(dim=-1)[rows],
            judged[rows],
        )

    @property
    def requested(self) -> Tensor:
        """``[N, D]`` bool: the dimension is requested."""
        return self.targets != INACTIVE

    @property
    def met(self) -> Tensor:
        """``[N, D]`` bool: the requested level is met; True where none is requested."""
        return self.error < 0.5

    @property
    def all_met(self) -> Tensor:
        """``[N]`` bool."""
        return self.met.all(dim=1)


def joint_control(records: Records, grids: Sequence[SweepGrid], preferences: PreferenceSet) -> Result | None:
    """Breaks down the share of answers that meet every requested level.

    Args:
        records: Answers to requests for several levels, of one kind.
        grids: Answers of the same policy to single requests, one grid per dimension.
        preferences: The ``D`` dimensions.

    Returns:
        None without such answers; else

        - ``by_count``: ``exact``, ``within_one`` (every level within one) and ``n_answers`` by number of requested
          dimensions;
        - ``dimensions``: by name, of the answers that request it: ``exact``, ``mae``, ``exact_if_others_met``, and
          ``single``, the exact share that single requests for the same levels reach;
        - ``pairs``: ``[D, D]`` share of answers that meet both of two requested levels;
        - ``by_distance``: ``distance``, ``exact`` and ``n_answers`` of three groups of equal size, see
          :func:`distance_from_singles`;
        - ``classifier``: ``exact``, the share that the classifier finds met; ``wrongly_met``, its share of the answers
          that the judge finds missed; ``agreement`` with the judge by dimension.

        Shares of no answers are NaN.
    """
    joint = JointRequests.of(records)
    if not len(joint.targets):
        return None
    counts = joint.requested.sum(dim=1)
    return {
        "by_count": {
            str(count): {
                "exact": _mean(joint.all_met[counts == count]),
                "within_one": _mean((joint.error < 1.5).all(dim=1)[counts == count]),
                "n_answers": int((counts == count).sum()),
            }
            for count in sorted(set(counts.tolist()))
        },
        "dimensions": {name: _dimension(joint, grid) for name, grid in zip(preferences.names, grids, strict=True)},
        "pairs": pair_shares(joint),
        "by_distance": _by_distance(joint, distance_from_singles(joint.targets, grids)),
        "classifier": _classifier(joint, preferences),
    }


def pair_shares(joint: JointRequests) -> Tensor:
    """``[D, D]`` share of the answers for which two dimensions are requested that meet both; NaN on the diagonal."""
    requested = joint.requested.double()
    both_met = (joint.requested & joint.met).double()
    shares = (both_met.T @ both_met) / (requested.T @ requested)
    return shares.fill_diagonal_(torch.nan)


def distance_from_singles(targets: Tensor, grids: Sequence[SweepGrid]) -> Tensor:
    """Distance of requests for several levels from the answers to requests for one of them.

    For every two requested dimensions ``d`` and ``e``, the level of ``e`` that answers to a single request for the
    level of ``d`` have on average is compared with the requested one: the mean of ``|target_e - mean_e(d, target_d)|``.

    Args:
        targets: ``[N, D]`` int64, requested levels, -1 = not requested.
        grids: Answers to single requests, one grid per dimension.

    Returns:
        ``[N]`` float64, in levels; NaN where fewer than two dimensions are requested.
    """
    requested = targets != INACTIVE
    total = torch.zeros(len(targets), dtype=torch.float64)
    count = torch.zeros_like(total)
    for grid in grids:
        i = grid.dimension
        means = grid.achieved.flatten(0, 1).nanmean(dim=0)  # [K, D]
        differences = (means[targets[:, i].clamp(min=0)] - targets).abs()  # [N, D]
        known = requested & requested[:, i : i + 1] & ~differences.isnan()
        known[:, i] = False
        total += differences.where(known, 0.0).sum(dim=1)
        count += known.sum(dim=1)
    return total / count


def _dimension(joint: JointRequests, grid: SweepGrid) -> Result:
    i = grid.dimension
    rows = joint.requested[:, i]
    met, targets = joint.met[rows, i], joint.targets[rows, i]
    others = joint.met[rows].clone()
    others[:, i] = True
    errors = (grid.swept - torch.arange(grid.swept.shape[-1])).abs()  # [Q, S, K]
    shares = (errors < 0.5).double().where(~errors.isnan(), torch.nan).flatten(0, 1).nanmean(dim=0)  # [K]
    return {
        "exact": _mean(met),
        "mae": _mean(joint.error[rows, i]),
        "exact_if_others_met": _mean(met[others.all(dim=1)]),
        "single": shares[targets].nanmean(),
        "n_answers": int(rows.sum()),
    }


def _by_distance(joint: JointRequests, distance: Tensor) -> list[Result]:
    order = distance.argsort(stable=True)
    order = order[~distance[order].isnan()]
    return [
        {"distance": _mean(distance[part]), "exact": _mean(joint.all_met[part]), "n_answers": len(part)}
        for part in order.tensor_split(DISTANCE_GROUPS)
        if len(part)
    ]


def _classifier(joint: JointRequests, preferences: PreferenceSet) -> Result:
    seen_as_met = ((joint.predicted == joint.targets) | ~joint.requested).all(dim=1)
    known = joint.requested & (joint.judged >= 0)
    agrees = joint.predicted == joint.judged
    return {
        "exact": _mean(seen_as_met),
        "wrongly_met": _mean(seen_as_met[~joint.all_met]),
        "agreement": {name: _mean(agrees[known[:, i], i]) for i, name in enumerate(preferences.names)},
    }


def _mean(values: Tensor) -> Tensor:
    """Mean of ``[M]`` values; NaN of none."""
    return values.double().mean()
