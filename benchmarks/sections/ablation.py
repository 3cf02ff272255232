"""Section on benchmarks/ablation.py."""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev
from typing import Any

from common import circumstances_line, table

Runs = dict[str, dict[str, float]]  # seed -> measure -> value

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5% quantile of Student's t, by number of seeds."""


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    factors: dict[str, dict[str, Runs]] = result["factors"]
    default = factors["default"]["default"]
    rows = [row(factor, arm, runs, default) for factor, arms in factors.items() for arm, runs in arms.items() if runs]
    failed = "".join(f"\n`{cell}` failed: {why}\n" for cell, why in result["failed"].items())
    header = [
        "factor",
        "arm",
        "mean Spearman",
        "difference",
        "exact",
        "MAE",
        "several at once",
        "shift",
        "gap",
    ]
    return f"""
## Ablation: the quickstart's policy with another part

{circumstances_line(result)}
Every arm makes {result["rollouts"]} rollouts, {result["answers"]} completions in all: at most a third of the
quickstart's, so scores are lower. Each seed has its own starter and classifier. The held-out questions are of another
fold than those of the quickstart above, so that defaults can be chosen by this table. The arms are the files in
`configs/experiment/`. Options are not tuned, except the default's minibatches and rate, which longer runs with seed 0
of this fold decided ([design choices](design/choices.md)).

{table(header, rows)}
Mean and standard deviation over seeds {", ".join(default)}; the difference to the default is paired by seed, with its
95% interval (Student's t), in bold if the interval excludes 0. Exact: share of levels met; several at once: all levels
of a request for two to four dimensions met; shift: largest change of a level without a request; gap: the classifier's
probability of the requested level minus the share met.

{verdict(factors)}
{failed}"""


def row(factor: str, arm: str, runs: Runs, default: Runs) -> list[str]:
    """One arm's line of the table."""
    others = [over(runs, name) for name in ("exact", "mae", "joint_exact", "default_shift", "gap")]
    differs = "" if runs is default else shown(difference(runs, default))
    return [factor, arm.split("/")[-1], over(runs, "spearman"), differs, *others]


def over(runs: Runs, measure: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [run[measure] for run in runs.values()]
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def difference(runs: Runs, default: Runs, measure: str = "spearman") -> tuple[float, float] | None:
    """Mean difference to the default over the seeds that both have, and half its 95% interval; None below two."""
    pairs = [run[measure] - default[seed][measure] for seed, run in runs.items() if seed in default]
    if len(pairs) not in T_975:
        return None
    return mean(pairs), T_975[len(pairs)] * stdev(pairs) / sqrt(len(pairs))


def shown(found: tuple[float, float] | None) -> str:
    """A difference, in bold where its interval leaves out 0."""
    if found is None:
        return "too few seeds"
    text = f"{found[0]:+.3f} ± {found[1]:.3f}"
    return f"**{text}**" if abs(found[0]) > found[1] else text


def verdict(factors: dict[str, dict[str, Runs]]) -> str:
    """Which arms are better or worse than the default beyond doubt, and which are better with every seed."""
    default = factors["default"]["default"]
    found = {arm: difference(runs, default) for arms in factors.values() for arm, runs in arms.items()}
    sure = {arm: pair[0] for arm, pair in found.items() if pair is not None and abs(pair[0]) > pair[1]}
    better = [f"`{arm}`" for arm, change in sure.items() if change > 0]
    worse = [f"`{arm}`" for arm, change in sure.items() if change < 0]
    ahead = [
        f"`{arm}`"
        for arms in factors.values()
        for arm, runs in arms.items()
        if runs
        and runs is not default
        and all(run["spearman"] > default[seed]["spearman"] for seed, run in runs.items())
    ]
    return (
        f"Significantly better than the default: {', '.join(better) or 'none'}. Better with every seed, perhaps by "
        f"chance: {', '.join(ahead) or 'none'}. Significantly worse: {', '.join(worse) or 'none'}.\n\n"
        "An arm becomes the default if it is significantly better at the same cost. More minibatches, and PPO with two "
        "passes over a rollout and a critic, make more optimizer steps per rollout than the default. With the whole "
        "budget the optimizers differ little (see Policy optimizers)."
    )
