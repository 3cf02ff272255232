"""Section on benchmarks/throughput.py."""

from __future__ import annotations

from typing import Any

from common import met, table

PAIR, BOTH = ("ours", "trl"), ("ours", "plain")
TARGETS = {
    "quickstart": {"speedup": ">= 2.0"},
    "medium": {"speedup": ">= 4.0", "rollout_speedup_vs_generate": ">= 3.5"},
}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    sizes = [size for size in TARGETS if size in result]
    versions = result["versions"]
    text = f"""
## Speed of the policy stage

`{result["command"]}` on {result["machine"]["processor"]}, {result["machine"]["cores"]} cores,
{result["threads"]} threads, no GPU; torch {versions["torch"]}, transformers {versions["transformers"]},
TRL {versions["trl"]}. Trainers take turns step by step on the same random weights, prompts, reward model, length limit,
end tokens and KL coefficient, in float32; figures are medians. "Plain" is this project with
`passes: {{share_prompts: never, chunked_logprobs: false}}`. TRL runs with the fastest of these settings:
{", ".join(result[sizes[0]]["trl_s_per_step_by_settings"])}.

"""
    rows = []
    for size in sizes:
        own, wanted = result[size], TARGETS[size]
        peak = f">= {own['peak_mb']['ours']}" if size == "medium" else "reported"
        rows += [
            [size, "ours, s per step", "", f"{own['ours_s_per_step']:.3f}"],
            [size, "plain, s per step", "", f"{own['plain_s_per_step']:.3f}"],
            [size, f"TRL ({own['trl_settings']}), s per step", "", f"{own['trl_s_per_step']:.3f}"],
            [size, "speed-up over TRL", wanted["speedup"], met(own["speedup"], wanted["speedup"])],
            [
                size,
                "rollouts, speed-up over `generate`",
                wanted.get("rollout_speedup_vs_generate", "reported"),
                met(own["rollout_speedup_vs_generate"], wanted.get("rollout_speedup_vs_generate", "reported")),
            ],
            [
                size,
                "peak memory ours / plain, MiB",
                "",
                f"{own['peak_mb']['ours']:.0f} / {own['peak_mb']['plain']:.0f}",
            ],
            [size, "peak memory TRL, MiB", "no less than ours", met(own["peak_mb"]["trl"], peak)],
            [
                size,
                "answer tokens per s, ours / TRL",
                "",
                " / ".join(f"{own['tokens_per_s'][who]:.0f}" for who in PAIR),
            ],
            [size, "tokens per answer, ours / TRL", "", " / ".join(f"{own['mean_length'][who]:.1f}" for who in PAIR)],
        ]
        if size in result.get("heads", {}):
            ratio = result["heads"][size]["ratio"]
            rows.append([size, "reward phase, 8 heads over 1", "<= 1.1", met(ratio, "<= 1.1")])
    text += table(["size", "figure", "asked for", "measured"], rows)
    phases = list(result[sizes[0]]["phases"])
    rows = [
        [size, who, *(f"{result[size][key].get(phase, 0.0):.3f}" for phase in phases)]
        for size in sizes
        for who, key in (("ours", "phases"), ("plain", "plain_phases"))
    ]
    text += "\nWhere a step's seconds go:\n\n" + table(["size", "", *phases], rows)
    for title, points in result.get("curves", {}).items():
        rows = [
            [
                value,
                *(f"{own[who][key]:.{digits}f}" for key, digits in (("s_per_step", 2), ("peak_mb", 0)) for who in BOTH),
            ]
            for value, own in points.items()
        ]
        header = [title, "ours, s per step", "plain, s per step", "ours, peak MiB", "plain, peak MiB"]
        text += f"\nMedium, by {title}:\n\n" + table(header, rows)
    return text
