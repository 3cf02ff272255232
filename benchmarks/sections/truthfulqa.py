"""Section on benchmarks/truthfulqa.py."""

from __future__ import annotations

from typing import Any

from common import circumstances_line, met, table

HEADS = ("truthful", "informative")
AUROC = {"truthful": 0.85, "informative": 0.94}
FROZEN = {"truthful": 0.70, "informative": 0.80}


def section(result: dict[str, Any]) -> str:
    """Returns the section."""
    rows = result["rows"]
    return f"""
## Reward classifier on TruthfulQA's judge data

{circumstances_line(result)}
{rows["train"]} training rows, {rows["validation"]} for calibration, {rows["test"]} of 160 other questions for the test.
Means over seeds; targets are in brackets.

{_quality(result)}
{_intervals(result)}

{_speed(result)}"""


def _quality(result: dict[str, Any]) -> str:
    shown = []
    for head in HEADS:
        own = result["auroc"][head]
        shown.append(f"{met(own['mean'], f'>= {AUROC[head]}')} ± {own['std']:.3f} (>= {AUROC[head]})")
    found = [["fine-tuned, cross-entropy", *shown, *_means(result["accuracy"]), *_errors(result["ece"])]]
    for name, own in result["baselines"].items():
        found.append([name, *_means(own["auroc"]), *_means(own["accuracy"]), "", ""])
    header = [
        "classifier",
        *(f"AUROC {h}" for h in HEADS),
        *(f"accuracy {h}" for h in HEADS),
        *(f"ECE {h}" for h in HEADS),
    ]
    return table(header, found)


def _means(values: dict[str, Any]) -> list[str]:
    return [f"{values[head]['mean']:.3f}" for head in HEADS]


def _errors(values: dict[str, Any]) -> list[str]:
    return [f"{met(values[head]['mean'], '<= 0.05')} (<= 0.05)" for head in HEADS]


def _intervals(result: dict[str, Any]) -> str:
    gaps = result["auroc_minus_regression"]
    shown = ", ".join(f"{head} [{low:+.3f}, {high:+.3f}]" for head, (low, high) in gaps.items())
    words = result["baselines"]["tfidf_lr"]["auroc"]
    lead = [f"{head} {result['auroc'][head]['mean'] - words[head]['mean']:+.3f}" for head in HEADS]
    chosen = result["validation_auroc"]["cross_entropy"]
    validation = ", ".join(f"{head} {chosen[head]['mean']:.3f}" for head in HEADS)
    seconds = [value for own in result["fit_seconds"].values() for value in own]
    return (
        f"AUROC above TF-IDF with logistic regression (target 0.08): {', '.join(lead)}. Above the regression head, "
        f"95% interval over questions, paired: {shown}. On the validation questions: {validation}. "
        f"A fine-tuning took {min(seconds):.0f} to {max(seconds):.0f} s, {result['jobs']} at a time."
    )


def _speed(result: dict[str, Any]) -> str:
    frozen, added, speed = result["frozen"], result["added_head"], result["throughput"]
    rows = [
        ["frozen backbone, second run, whole fit, s", "< 20", met(frozen["seconds"], "<= 20")],
        ["the same, first run, which writes the cache, s", "reported", f"{frozen['seconds_with_cache_to_make']:.0f}"],
        *(
            [f"frozen backbone, AUROC {head}", f">= {FROZEN[head]}", met(frozen["auroc"][head], f">= {FROZEN[head]}")]
            for head in HEADS
        ),
        [f"new head from {added['labels']} labels, s", "< 10", met(added["seconds"], "<= 10")],
        ["its AUROC", "reported", f"{added['auroc']:.3f}"],
        ["the other head's probabilities unchanged, bit by bit", "yes", "yes" if added["unchanged"] else "**no**"],
        [
            "rows per second against a plain padded transformers Trainer, float32",
            ">= 1.8x",
            f"{met(result['throughput_ratio'], '>= 1.8')}x "
            f"({speed['ours_rows_per_s']:.0f} / {speed['trainer_rows_per_s']:.0f})",
        ],
        ["padding share of our batches", "< 0.10", met(speed["padding_share"], "<= 0.1")],
    ]
    return table(["figure", "asked for", "reached"], rows)
