"""Question: how fast is a step of the policy stage on a CPU, beside TRL's RLOO on the same models and prompts?

    pip install -e '.[benchmarks]'
    python benchmarks/throughput.py

Ours, ours with every fast way switched off (``PLAIN``) and TRL take turns step by step; figures are medians. All have
the same random weights, prompts, numbers of samples, length limit, end tokens, KL coefficient, reward model and data
type. Of TRL's settings under ``TRL`` the two that are fastest alone take part, and the faster of these counts.
``speedup`` is TRL's seconds over ours. ``--earlier FOLDER`` lets the source of an earlier commit take part, on prompts
of its own (``git archive COMMIT | tar x -C FOLDER``). What is measured is kept under ``--work``, part by part, until
the source changes: a call that was stopped goes on there. ``--parts`` names those to make; the result holds all that
are kept.
Last result: benchmarks/results/throughput.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, circumstances, once, recalled, source_digest, write
from race import Entrant, in_turns, race
from rollouts import rollouts
from step_profile import profile
from worlds import World, data_of, save, worlds

from moslim import Scorer
from moslim.data.types import RowKind, Split

OURS = Entrant("ours")
PLAIN = Entrant(
    "ours",
    {
        "forward_config": {"tokens": 10**9, "share_prefixes": "never", "chunked_logprobs": False},
        "decoding": {
            "share_prompts": False,
            "drop_finished": False,
            "merge": False,
            "cache": "dynamic",
            "pack_head": False,
            "draw": "multinomial",
            "inference_mode": False,
        },
        "off_policy": {"old_logprobs": "recompute"},
    },
)
STATIC = {"cache_implementation": "static"}
TRL: dict[str, dict[str, Any]] = {
    "whole batch": {},
    "4 accumulated parts": {"parts": 4},
    "8 accumulated parts": {"parts": 8},
    "static cache": STATIC,
    "static cache, 4 parts": {"parts": 4, **STATIC},
    "static cache, 8 parts": {"parts": 8, **STATIC},
    "continuous batching": {"use_transformers_continuous_batching": True},
}
CURVES: dict[str, tuple[str, list[int]]] = {
    "samples": ("samples", [2, 4, 8, 16]),
    "prompt length": ("prompt_tokens", [32, 128, 512]),
    "vocabulary": ("words", [2000, 8000, 32000, 128000]),
    "dimensions": ("heads", [1, 2, 4, 8]),
}


def fastest_trl(world: World) -> dict[str, Any]:
    """Seconds per step of TRL by its settings, None where one does not run here, and the two that took least."""
    tried: dict[str, float | None] = {}
    with models_of(world) as folder:
        for name, settings in TRL.items():
            try:
                tried[name] = race({"trl": Entrant("trl", settings)}, world, folder, 2)["trl"]["s_per_step"]
            except RuntimeError as error:
                tried[name] = None
                print(f"TRL with {name} does not run here: {error}", file=sys.stderr)
    best = sorted((name for name in tried if tried[name]), key=lambda name: tried[name] or 0.0)
    return {"fastest": best[:2], "s_per_step": tried}


def compare(world: World, repeats: int, made: dict[str, Any], settings: str, earlier: Path | None) -> dict[str, Any]:
    """A step of ours, of ours without fast ways, and of TRL with the faster of the two settings found before."""
    candidates = made[settings]["fastest"]
    entrants = {"ours": OURS, "plain": PLAIN, **{name: Entrant("trl", TRL[name]) for name in candidates}}
    if earlier is not None:
        entrants["earlier"] = Entrant("earlier", source=earlier / "src")
    with models_of(world) as folder:
        found = race(entrants, world, folder, repeats)
    trl = min(candidates, key=lambda name: found[name]["s_per_step"])
    found["trl"] = found[trl]
    found = {who: own for who, own in found.items() if who not in candidates}
    mine = found["ours"]
    result = {f"{who}_s_per_step": own["s_per_step"] for who, own in found.items()}
    for name, who in (("speedup", "trl"), ("speedup_of_fast_ways", "plain"), ("speedup_since_earlier", "earlier")):
        if who in found:
            result[name] = round(found[who]["s_per_step"] / mine["s_per_step"], 2)
    by_entrant = ("cpu_s_per_step", "tokens_per_s", "mean_length", "peak_mb")
    return {
        "world": asdict(world),
        "trl_settings": trl,
        **result,
        "phases": mine["phases"],
        "plain_phases": found["plain"]["phases"],
        **{key: {who: own[key] for who, own in found.items()} for key in by_entrant},
    }


def sampling(world: World, repeats: int) -> dict[str, Any]:
    """Rollouts alone."""
    with models_of(world) as folder:
        return rollouts(world, folder, repeats)


@contextmanager
def models_of(world: World) -> Iterator[Path]:
    """A folder with the models of a world."""
    with tempfile.TemporaryDirectory() as folder:
        save(world, Path(folder))
        yield Path(folder)


def heads(world: World, counts: tuple[int, int], repeats: int) -> dict[str, Any]:
    """The reward phase with few and with many heads."""
    scorers = {}
    for count in counts:
        with models_of(replace(world, heads=count)) as folder:
            scorers[f"{count} heads"] = Scorer(folder / "classifier", device="cpu")
    questions = [row.question for row in data_of(world).rows(RowKind.PROMPTS, Split.TRAIN)[: world.prompts]]
    texts = [" ".join([str(questions[0])] * 4).split()[: 8 + i % 33] for i in range(world.prompts * world.samples)]
    asked = [question for question in questions for _ in range(world.samples)]
    answers = [" ".join(words) for words in texts]

    def scored(scorer: Scorer) -> Callable[[int], object]:
        return lambda _: scorer.probabilities(asked, answers)

    found = in_turns(repeats, **{name: scored(scorer) for name, scorer in scorers.items()})
    few, many = found.values()
    return {"seconds": {name: round(value, 4) for name, value in found.items()}, "ratio": round(many / few, 3)}


def curve(world: World, axis: str, values: list[int], repeats: int) -> dict[str, Any]:
    """How step time and memory grow with one thing, with the fast ways and without."""
    result = {}
    for value in values:
        changed = replace(world, **{axis: value})
        with models_of(changed) as folder:
            found = race({"ours": OURS, "plain": PLAIN}, changed, folder, repeats)
        kept = ("s_per_step", "cpu_s_per_step", "peak_mb", "phases")
        result[str(value)] = {who: {key: own[key] for key in kept} for who, own in found.items()}
    return result


def processes(world: World, repeats: int) -> dict[str, Any]:
    """One process with two threads, and two with one, on the same batches."""
    entrants = {"1": OURS, "2": Entrant("ours", {"processes": 2})}
    with models_of(world) as folder:
        found = race(entrants, world, folder, repeats)
    kept = ("s_per_step", "peak_mb", "phases")  # memory: of the first process
    return {count: {key: own[key] for key in kept} for count, own in found.items()}


def parts(made: dict[str, Any], repeats: int, earlier: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """What the result is made of, by name and in order: the race needs TRL's settings from among those ``made``."""
    sizes, few = worlds(), min(repeats, 3)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, world in sizes.items():
        found[f"{name}, TRL settings"] = partial(fastest_trl, world)
        found[name] = partial(compare, world, repeats, made, f"{name}, TRL settings", earlier)
        found[f"{name}, rollouts"] = partial(sampling, world, repeats)
        found[f"{name}, heads"] = partial(heads, world, (1, 8), 2 * repeats)
        found[f"{name}, profile"] = partial(profile, world)
        found[f"{name}, by processes"] = partial(processes, world, few)
    for title, (axis, values) in CURVES.items():
        found[f"medium, by {title}"] = partial(curve, sizes["medium"], axis, values, few)
    return found


KEYS = ("ours_s_per_step", "trl_s_per_step", "speedup", "phases", "tokens_per_s", "peak_mb")


def by_size(made: dict[str, Any]) -> dict[str, Any]:
    """What is asked for first, for each size whose race has been run."""
    found = {}
    for size in (size for size in worlds() if size in made):
        found[size] = {key: made[size][key] for key in KEYS}
        found[size] |= {
            key: v for key, v in made.get(f"{size}, rollouts", {}).items() if key.startswith("rollout_speed")
        }
    return found


def needed(names: list[str]) -> list[str]:
    """What parts are made from: a race takes the fastest of TRL's settings."""
    return [f"{name}, TRL settings" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument("--repeats", type=int, default=7, help="steps that count, per trainer")
    parser.add_argument("--earlier", type=Path, help="folder that holds an earlier version in src/")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/throughput-benchmark")
    parser.add_argument("--parts", nargs="+", choices=list(parts({}, 1, None)), help="which to make, if not all")
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -e '.[benchmarks]'")
    args.work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    here = circumstances()
    here["versions"]["trl"] = version("trl")
    here["threads"] = torch.get_num_threads()
    earlier = args.earlier and source_digest(args.earlier / "src")
    depends = [here["versions"], here["machine"], here["threads"], args.repeats, source_digest()]
    for name, make in parts(made, args.repeats, args.earlier).items():
        if not args.parts or name in args.parts or name in needed(args.parts):
            made[name] = once(args.work, name, [*depends, earlier], make)
        elif (found := recalled(args.work, name, [*depends, earlier])) is not None:
            made[name] = found
    write(args.out, {**here, **by_size(made), "parts": made})


if __name__ == "__main__":
    main()
