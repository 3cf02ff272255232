"""Section on benchmarks/policy_stage.py."""

from __future__ import annotations

from typing import Any

from cells import quickstart_key
from common import circumstances_line, met, outdated, table

MEASURES = ("spearman", "exact", "within_one", "mae")


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    note = outdated(result.get("key", ""), quickstart_key())
    text = f"""
## The quickstart's policy stage, three ways

{circumstances_line(result)}
{note}The same starter, classifier, seed and number of steps. "Every fast way off" sets the switches of
sampling, forward passes and update in [speed](speed.md). "One step off" samples the next batch while the policy learns
from the current one, on the same two cores. CPU seconds are those of all threads, including the start of Python. The
gold scorer judges held-out questions.

"""
    rows = [
        [
            seed,
            form,
            f"{own['fit_s']:.0f}",
            f"{own['fit_cpu_s']:.0f}",
            *(f"{own['mean'][name]:.3f}" for name in MEASURES),
        ]
        for seed, runs in result["runs"].items()
        for form, own in runs.items()
    ]
    text += table(["seed", "form", "fit, s", "fit, CPU s", *MEASURES], rows)
    ratios = [
        f"seed {seed}: {met(own['fit_s'], '>= 2.0')} in seconds, {own['fit_cpu_s']:.2f} in CPU seconds"
        for seed, own in result["speedup"].items()
    ]
    if ratios:
        text += f"\nEvery fast way off, over as shipped (asked for: 2 or more): {'; '.join(ratios)}.\n"
    phases = sorted({name for runs in result["runs"].values() for own in runs.values() for name in own["phases"]})
    rows = [
        [seed, form, *(f"{own['phases'].get(name, 0.0):.3f}" for name in phases)]
        for seed, runs in result["runs"].items()
        for form, own in runs.items()
    ]
    text += (
        "\nSeconds, means over the logged steps. Of a rollout: `sample` (the time that it waits for completions), "
        "`reward`, `old`, `reference` and `critic`. Of an optimizer step: `forward`, `backward`, `update`, and `step` "
        "for steps without a rollout:\n\n"
    )
    text += table(["seed", "form", *phases], rows)
    stale = {
        seed: runs["one step off"]["off_policy"] for seed, runs in result["runs"].items() if "one step off" in runs
    }
    for seed, own in stale.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in own.items())
        text += f"\nOne step off, seed {seed}, means: {shown}.\n"
    return text
