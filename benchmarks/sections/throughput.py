"""Section on benchmarks/throughput.py."""

from __future__ import annotations

from typing import Any

from common import Row, met, table

PAIR, BOTH = ("ours", "trl"), ("ours", "plain")
TARGETS = {
    "quickstart": {"speedup": ">= 2.0", "speedup_of_fast_ways": ">= 2.0"},
    "medium": {"speedup": ">= 4.0", "rollout_speedup_vs_generate": ">= 3.5"},
}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    parts, versions = result["parts"], result["versions"]
    sizes = [size for size in TARGETS if size in parts]
    text = f"""
## Speed of the policy stage

`{result["command"]}` on {result["machine"]["processor"]}, {result["machine"]["cores"]} cores,
{result["threads"]} threads, no GPU; torch {versions["torch"]}, transformers {versions["transformers"]},
TRL {versions["trl"]}. Trainers take turns step by step on the same random weights, prompts, reward model, length limit,
end tokens and KL coefficient, in float32; figures are medians. "Plain" is this project with the
switches of sampling, forward passes and update in [speed](speed.md) set. TRL runs with the fastest of the settings
listed below.

"""
    text += table(["size", "figure", "asked for", "measured"], [row for size in sizes for row in _figures(size, parts)])
    for size in sizes:
        tried = parts[f"{size}, TRL settings"]["s_per_step"]
        shown = ", ".join(f"{name} {_seconds(value)}" for name, value in tried.items())
        text += f"\nTRL's settings, {size}, s per step: {shown}.\n"
    text += "\nSeconds of a step by phase:\n\n" + _phases(sizes, parts)
    text += "".join(_rollouts(size, parts[f"{size}, rollouts"]) for size in sizes if f"{size}, rollouts" in parts)
    text += "".join(_profile(size, parts[f"{size}, profile"]) for size in sizes if f"{size}, profile" in parts)
    for name, points in parts.items():
        size, _, axis = name.partition(", by ")
        if axis == "processes":
            text += _processes(size, points)
        elif axis:
            text += _curve(size, axis, points)
    return text


def _seconds(value: float | None) -> str:
    return "does not run" if value is None else f"{value:.2f}"


def _figures(size: str, parts: dict[str, Any]) -> list[Row]:
    own, wanted = parts[size], TARGETS[size]
    sampled, heads = parts.get(f"{size}, rollouts", {}), parts.get(f"{size}, heads", {})
    peak = f">= {own['peak_mb']['ours']}" if size == "medium" else "reported"
    rows = [
        [size, "ours, s per step", "", f"{own['ours_s_per_step']:.3f}"],
        [size, "plain, s per step", "", f"{own['plain_s_per_step']:.3f}"],
        [size, f"TRL ({own['trl_settings']}), s per step", "", f"{own['trl_s_per_step']:.3f}"],
    ]
    ratios = {
        "speedup": (own, "TRL over ours"),
        "speedup_of_fast_ways": (own, "plain over ours"),
        "speedup_since_earlier": (own, "first version over ours"),
        "rollout_speedup_vs_generate": (sampled, "rollouts, `generate` over ours"),
    }
    for key, (where, title) in ratios.items():
        if key in where:
            asked = wanted.get(key, "reported")
            rows.append([size, title, asked, met(where[key], asked)])
    if heads:
        rows.append([size, "reward phase, 8 heads over 1", "<= 1.1", met(heads["ratio"], "<= 1.1")])
    shown = " / ".join(f"{own['peak_mb'][who]:.0f}" for who in BOTH)
    tokens = " / ".join(f"{own['tokens_per_s'][who]:.0f}" for who in PAIR)
    lengths = " / ".join(f"{own['mean_length'][who]:.1f}" for who in PAIR)
    cpu = " / ".join(f"{own['cpu_s_per_step'][who]:.2f}" for who in (*PAIR, "plain"))
    return [
        *rows,
        [size, "peak memory ours / plain, MiB", "", shown],
        [size, "peak memory TRL, MiB", "no less than ours", met(own["peak_mb"]["trl"], peak)],
        [size, "CPU s per step of all threads, ours / TRL / plain", "", cpu],
        [size, "answer tokens per s, ours / TRL", "", tokens],
        [size, "tokens per answer, ours / TRL", "", lengths],
    ]


def _phases(sizes: list[str], parts: dict[str, Any]) -> str:
    phases = list(parts[sizes[0]]["phases"])
    rows = [
        [size, who, *(f"{parts[size][key].get(phase, 0.0):.3f}" for phase in phases)]
        for size in sizes
        for who, key in (("ours", "phases"), ("plain", "plain_phases"))
    ]
    return table(["size", "", *phases], rows)


def _rollouts(size: str, found: dict[str, Any]) -> str:
    ways = {"`generate`": found["generate_s"], **found["rollout_s_by_way"]}
    rows = [[name, f"{value:.3f}"] for name, value in ways.items()]
    return f"\nA rollout alone, {size}: as shipped, and with one option changed at a time.\n\n" + table(["", "s"], rows)


def _profile(size: str, found: dict[str, Any]) -> str:
    rows = [[name, f"{own['share']:.1%}", str(own["calls"])] for name, own in found["operations"].items()]
    return (
        f"\nOperations of a step, {size}. Its matrix products are {found['gflop']:.1f} GFLOP. At the rate of the "
        f"fastest product on this machine, {found['gflops_per_s']:.0f} GFLOP/s, they take {found['floor_s']:.2f} s, "
        f"the lower bound of a step that takes {found['step_s']:.2f} s.\n\n"
        + table(["operation", "share of the time", "calls"], rows)
    )


def _processes(size: str, points: dict[str, Any]) -> str:
    rows = [[count, f"{own['s_per_step']:.3f}", f"{own['peak_mb']:.0f}"] for count, own in points.items()]
    return f"\nThe same batch in one process with all threads, or in two that share them, {size}:\n\n" + table(
        ["processes", "s per step", "peak MiB of the first"], rows
    )


def _curve(size: str, axis: str, points: dict[str, Any]) -> str:
    columns = (("s_per_step", 2), ("peak_mb", 0))
    rows = [
        [value, *(f"{own[who][key]:.{digits}f}" for key, digits in columns for who in BOTH)]
        for value, own in points.items()
    ]
    header = [axis, "ours, s per step", "plain, s per step", "ours, peak MiB", "plain, peak MiB"]
    return f"\n{size.capitalize()}, by {axis}:\n\n" + table(header, rows)
