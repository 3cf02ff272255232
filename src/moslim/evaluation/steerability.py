"""Steerability: how closely the achieved levels follow the requested ones, as one plain JSON document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moslim.errors import UsageError
from moslim.evaluation.judges import JudgeInfo
from moslim.evaluation.measures import SweepGrid, control, level_shares, mean_interval, slopes, sweeps
from moslim.evaluation.records import KINDS, Records
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.reporting import Result, plain

SCHEMA = 1
"""Version of the document; a key that is added does not change it."""

MEASURES = ("exact", "within_one", "mae", "spearman", "monotonicity", "dynamic_range")


def steerability(
    policy: Records, base: Records, preferences: PreferenceSet, judge: JudgeInfo, config: dict[str, Any]
) -> Result:
    """Compares a policy with the one it started from.

    Args:
        policy: Judged answers of the trained policy.
        base: Judged answers of the starting policy to the same prompts.
        preferences: The dimensions, in the order of the records.
        judge: Who measured the achieved levels.
        config: Settings of the run to keep with the result: plain data without paths, times or versions.

    Returns:
        Plain data that :mod:`json` writes as it is: floats rounded to 6 digits, None for what could not be
        measured. It does not depend on the order of the records.

    Raises:
        UsageError: The records have another number of dimensions than ``preferences``.
    """
    for owner, records in (("policy", policy), ("base", base)):
        if records.targets.shape[1] != len(preferences):
            raise UsageError(
                f"the {owner}'s records have {records.targets.shape[1]} dimensions, preferences {len(preferences)}"
            )
    policy, base = policy.canonical(), base.canonical()
    after, before = sweeps(policy, preferences.sizes), sweeps(base, preferences.sizes)
    names = preferences.names
    talk = torch.stack([slopes(sweep.achieved).nanmean(dim=0) for sweep in after])
    gain = talk.diagonal()[:, None]
    relative = (talk / gain).where(gain.abs() > 1e-6, torch.nan)
    others = ~torch.eye(len(names), dtype=torch.bool)
    measured, measured_before = _control(after, names), _control(before, names)
    result = {
        "schema": SCHEMA,
        "judge": {"name": judge.name, "proxy": judge.proxy},
        **measured,
        "interval": {
            measure: mean_interval([control(sweep.own)[measure] for sweep in after])
            for measure in ("exact", "spearman")
        },
        "base": {**measured_before, "combinations": _combinations(base)},
        "combinations": _combinations(policy),
        "cross_talk": talk,
        "cross_talk_normalised": relative,
        "interference": relative[others].abs().nanmean(),
        "reward": _reward(measured_before, measured, {"before": before, "after": after}, names),
        "default_quality": {"before": _default(base, names), "after": _default(policy, names)},
        "curves": {
            name: {
                "requested": list(preferences[name].levels),
                "policy": a.own.nanmean(dim=(0, 1)),
                "base": b.own.nanmean(dim=(0, 1)),
                "shares": level_shares(a.own),
            }
            for name, a, b in zip(names, after, before, strict=True)
        },
        "n_questions": len(policy.question.unique()),
        "n_answers": len(policy),
    }
    return {**plain(result), "config": config}


def measures(records: Records, preferences: PreferenceSet) -> Result:
    """The level sweep alone: ``dimensions`` (name to measure to value) and their ``mean``, as plain data."""
    return plain(_control(sweeps(records.canonical(), preferences.sizes), preferences.names))


def _control(grids: list[SweepGrid], names: tuple[str, ...]) -> Result:
    dimensions = {
        name: {measure: value.nanmean() for measure, value in control(sweep.own).items()}
        for name, sweep in zip(names, grids, strict=True)
    }
    return {"dimensions": dimensions, "mean": {m: _mean([d[m] for d in dimensions.values()]) for m in MEASURES}}


def _combinations(records: Records) -> Result:
    further = sorted(set(records.kinds) - set(KINDS))
    return {kind: _joint(records.of_kind(kind)) for kind in ("seen", "unseen", *further)}


def _joint(records: Records) -> Result | None:
    """Share of answers with every requested level met, and the mean over dimensions of the MAE."""
    if not len(records):
        return None
    active = records.targets != INACTIVE
    error = (records.achieved.double() - records.targets).abs().where(active, torch.nan)
    judged = (active & ~error.isnan()).sum(dim=1) == active.sum(dim=1)
    met = ((error < 0.5) | ~active).all(dim=1)[judged]
    return {"joint_exact": met.double().mean(), "mae": error.nanmean(dim=0).nanmean(), "n_answers": len(records)}


def _reward(before: Result, after: Result, grids: dict[str, list[SweepGrid]], names: tuple[str, ...]) -> Result:
    """What training raised (proxy: p_target) beside what was wanted (gold: exact), on the same answers."""
    gold = {"before": before["dimensions"], "after": after["dimensions"]}
    dimensions: Result = {
        name: {
            "proxy": {time: rows[i].p_target.nanmean() for time, rows in grids.items()},
            "gold": {time: gold[time][name]["exact"] for time in grids},
        }
        for i, name in enumerate(names)
    }
    means = {
        kind: {time: _mean([values[kind][time] for values in dimensions.values()]) for time in grids}
        for kind in ("proxy", "gold")
    }
    gap = {time: means["proxy"][time] - means["gold"][time] for time in grids}
    return {**means, "gap": gap, "dimensions": dimensions}


def _default(records: Records, names: tuple[str, ...]) -> Result:
    """Mean level of every dimension where nothing was asked for."""
    levels = records.of_kind("default").achieved.double().nanmean(dim=0)
    return dict(zip(names, levels, strict=True))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).nanmean()
