"""Question: what does the prefix tree alone give an update?

    python benchmarks/prefix_tree.py

Samples one rollout of each size, and computes the same update (forward and backward pass of the policy), pass of the
reference and level probabilities of the classifier in one process, in turns: with the tree (``passes.share_prefixes:
always``) and without it (``never``). All other options are the same. Seconds are medians; ``ratio`` is without over
with.
Last result: benchmarks/results/prefix_tree.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write
from lightning.pytorch import Callback
from race import in_turns
from racers import ours
from worlds import World, save, worlds

from moslim import PolicyTrainer
from moslim.ops import ForwardConfig
from moslim.ops.prefix_tree import in_order

WAYS = {"with": ForwardConfig(share_prefixes="always"), "without": ForwardConfig(share_prefixes="never")}


class Compared(Callback):
    """Measures after the first step of a run, on its rollout."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.result: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.result = compare(pl_module, self.repeats)


def compare(module: PolicyTrainer, repeats: int) -> dict[str, Any]:
    """Seconds of each part by way, their ratio, tokens that a model computes, and how far log-probabilities differ."""
    rollout = module.rollout
    assert rollout is not None
    found = {}

    def update(way: str) -> Callable[[int], object]:
        policy_update = replace(module.policy_update, forward_config=WAYS[way])

        def run(_: int) -> None:
            step = policy_update.loss(rollout, [rollout], 1.0, False)
            step.loss.backward()
            module.zero_grad()
            found[way] = step.logprobs

        return run

    def reference(way: str) -> Callable[[int], object]:
        temperature = module.engine.temperature

        def run(_: int) -> None:
            with torch.no_grad():
                module.models.ref_logprobs(rollout.batch, temperature, WAYS[way])

        return run

    def reward(way: str) -> Callable[[int], object]:
        share = WAYS[way].share_prefixes
        return lambda _: module.scorer.probabilities(rollout.questions, rollout.completion_texts, share_prefixes=share)

    parts: dict[str, dict[str, float]] = {}
    for name, made in {"update": update, "reference": reference, "reward": reward}.items():
        seconds = in_turns(repeats, **{way: made(way) for way in WAYS})
        parts[name] = {way: round(value, 4) for way, value in seconds.items()}
        parts[name]["ratio"] = round(seconds["without"] / seconds["with"], 2)
    return {
        "parts": parts,
        "tokens": tokens(module),
        "difference": float((found["with"] - found["without"])[rollout.mask].abs().max()),
    }


def tokens(module: PolicyTrainer) -> dict[str, int]:
    """Tokens that the policy computes in an update, by way; padding is left out."""
    rollout = module.rollout
    assert rollout is not None
    ids, lengths = rollout.batch.sequences(torch.arange(len(rollout)))
    lengths = lengths - 1  # the last token predicts nothing
    parts = in_order(ids, lengths).parts(WAYS["with"].limit(ids.device))
    return {"with": sum(int(part.new.sum()) for part in parts), "without": int(lengths.sum())}


def measure(world: World, repeats: int) -> dict[str, Any]:
    """The comparison for one size."""
    compared = Compared(repeats)
    with tempfile.TemporaryDirectory() as folder:
        save(world, Path(folder))
        ours(world, Path(folder), 1, [compared], {})
    return compared.result


def main() -> None:
    sizes = worlds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(sizes), default=list(sizes))
    parser.add_argument("--repeats", type=int, default=7, help="calls that count, per part and way")
    parser.add_argument("--out", type=Path, default=RESULTS / "prefix_tree.json")
    args = parser.parse_args()
    found = {size: measure(sizes[size], args.repeats) for size in args.sizes}
    write(args.out, {**circumstances(), "threads": torch.get_num_threads(), "sizes": found})


if __name__ == "__main__":
    main()
