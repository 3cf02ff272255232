"""Question: how fast is a step of the policy stage on a CPU, beside TRL's RLOO on the same models and prompts?

    pip install -e '.[benchmarks]'
    python benchmarks/throughput.py --out benchmarks/results/throughput.json

Ours, ours with the fast ways of passes switched off, and TRL run in processes of their own and take turns step by step,
so that whatever else the machine does strikes all of them; figures are medians. All have the same random weights,
prompts, numbers of samples, length limit, end tokens, KL coefficient, reward model and data type. TRL runs with the
fastest of the settings under ``TRL``, which is found first. ``speedup`` is TRL's seconds over ours.
Last result: benchmarks/results/throughput.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, circumstances, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import World, data_of, save, worlds

from moslim.data.asking import SampledPrompts
from moslim.data.loader import Draw
from moslim.data.prompts import pad
from moslim.data.types import Split, View
from moslim.models import eos_ids
from moslim.noise import derive_seed
from moslim.policy.engines import TorchEngine
from moslim.reward.scorer import Scorer

HERE = Path(__file__).resolve().parent
FAST: dict[str, Any] = {}
PLAIN = {"share_prompts": "never", "chunked_logprobs": False}
TRL: dict[str, dict[str, Any]] = {
    "whole batch": {},
    "four accumulated parts": {"parts": 4},
    "continuous batching": {"use_transformers_continuous_batching": True},
}
CURVES: dict[str, dict[str, list[int]]] = {
    "samples": {"samples": [2, 4, 8, 16]},
    "prompt length": {"prompt_tokens": [32, 128, 512]},
    "vocabulary": {"words": [2000, 8000, 32000, 128000]},
    "heads": {"heads": [1, 2, 4, 8]},
}


class Racer:
    """A trainer in a process of its own, which does a step when told to.

    Args:
        kind: ``ours`` or ``trl``.
        world: What is trained.
        folder: Where its models lie.
        steps: How many steps it will be told to do.
        settings: Of the trainer.
    """

    def __init__(self, kind: str, world: World, folder: Path, steps: int, settings: dict[str, Any]) -> None:
        specification = {"racer": kind, "world": asdict(world), "folder": str(folder), "settings": settings}
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump({**specification, "steps": steps}, file)
        self.name = f"{kind} {settings}"
        self._log = open(f"{file.name}.log", "w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "racers.py"), file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def step(self) -> dict[str, Any]:
        """Does one step; seconds, phases and mean length of answers."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._line()

    def finish(self) -> float:
        """Ends it after its last step; peak memory in MiB."""
        peak: float = self._line()["peak_mb"]
        self._process.communicate()
        return peak

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended early:\n{self._log.read()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def race(
    entrants: dict[str, tuple[str, dict[str, Any]]], world: World, folder: Path, repeats: int
) -> dict[str, dict[str, Any]]:
    """Lets trainers take turns; the first step of each, which warms up, does not count.

    Returns:
        By entrant: ``s_per_step``, ``cpu_s_per_step`` (of all threads), ``phases``, ``mean_length``, ``tokens_per_s``
        and ``peak_mb``.
    """
    racers = {name: Racer(kind, world, folder, repeats + 1, own) for name, (kind, own) in entrants.items()}
    laps: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
    for _ in range(repeats + 1):
        for name, racer in racers.items():
            laps[name].append(racer.step())
    return {name: _summary(laps[name][1:], racer.finish(), world) for name, racer in racers.items()}


def _summary(laps: list[dict[str, Any]], peak: float, world: World) -> dict[str, Any]:
    answers = world.prompts * world.samples
    phases = {name: round(median(lap["phases"][name] for lap in laps), 4) for name in laps[0]["phases"]}
    return {
        "s_per_step": round(median(lap["seconds"] for lap in laps), 4),
        "cpu_s_per_step": round(median(lap["cpu"] for lap in laps), 4),
        "phases": phases,
        "mean_length": round(sum(lap["length"] for lap in laps) / len(laps), 1),
        "tokens_per_s": round(median(answers * lap["length"] / lap["seconds"] for lap in laps), 1),
        "peak_mb": round(peak, 1),
    }


def compare(world: World, folder: Path, repeats: int) -> dict[str, Any]:
    """Everything about one size."""
    tried = {}
    for name, settings in TRL.items():
        try:
            tried[name] = race({"trl": ("trl", settings)}, world, folder, 2)["trl"]["s_per_step"]
        except RuntimeError as error:
            tried[name] = None
            print(f"TRL with {name} does not run here: {error}", file=sys.stderr)
    best = min((name for name in tried if tried[name]), key=lambda name: tried[name])
    entrants = {"ours": ("ours", FAST), "trl": ("trl", TRL[best]), "plain": ("ours", PLAIN)}
    found = race(entrants, world, folder, repeats)
    mine, theirs, plain = found["ours"], found["trl"], found["plain"]
    return {
        "ours_s_per_step": mine["s_per_step"],
        "trl_s_per_step": theirs["s_per_step"],
        "speedup": round(theirs["s_per_step"] / mine["s_per_step"], 2),
        "plain_s_per_step": plain["s_per_step"],
        "speedup_of_passes": round(plain["s_per_step"] / mine["s_per_step"], 2),
        "cpu_s_per_step": {name: own["cpu_s_per_step"] for name, own in found.items()},
        "phases": mine["phases"],
        "plain_phases": plain["phases"],
        "tokens_per_s": {name: own["tokens_per_s"] for name, own in found.items()},
        "mean_length": {name: own["mean_length"] for name, own in found.items()},
        "peak_mb": {name: own["peak_mb"] for name, own in found.items()},
        "trl_settings": best,
        "trl_s_per_step_by_settings": tried,
        **rollouts(world, folder, repeats),
    }


def in_turns(repeats: int, **contestants: Callable[[int], object]) -> dict[str, float]:
    """Median seconds of functions that are called in turns, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function(number)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(own[1:]) for name, own in seconds.items()}


def rollouts(world: World, folder: Path, repeats: int) -> dict[str, float]:
    """The engine against ``generate``, on one batch of prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    data = data_of(world)
    rows = data.rows(View.POLICY, Split.TRAIN)
    prompts = SampledPrompts(rows, data.preferences, data.sampler, data.source, data.seed)
    renderer = data.renderer(tokenizer)
    chosen = [prompts[Draw(0, row)] for row in range(world.prompts)]
    ids, mask = pad([renderer.ids(p.question, p.preference) for p in chosen], tokenizer.pad_token_id, left=True)
    engine, ends = TorchEngine(world.new_tokens), eos_ids(model, tokenizer)

    def ours(number: int) -> None:
        seeds = [[derive_seed(number, row, i) for i in range(world.samples)] for row in range(world.prompts)]
        engine.sample(model, ids, mask, torch.tensor(seeds), ends, tokenizer.pad_token_id)

    def generate(number: int) -> None:
        torch.manual_seed(number)
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=world.new_tokens,
                num_return_sequences=world.samples,
            )

    found = in_turns(repeats, ours=ours, generate=generate)
    return {
        "rollout_s": round(found["ours"], 4),
        "generate_s": round(found["generate"], 4),
        "rollout_speedup_vs_generate": round(found["generate"] / found["ours"], 2),
    }


def heads(world: World, counts: tuple[int, int], repeats: int) -> dict[str, Any]:
    """The reward phase with few and with many heads."""
    scorers = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            save(replace(world, heads=count), Path(folder))
            scorers[f"{count} heads"] = Scorer.from_pretrained(Path(folder) / "classifier")
    questions = [row.question for row in data_of(world).rows(View.POLICY, Split.TRAIN)[: world.prompts]]
    texts = [" ".join([str(questions[0])] * 4).split()[: 8 + i % 33] for i in range(world.prompts * world.samples)]
    asked = [question for question in questions for _ in range(world.samples)]
    answers = [" ".join(words) for words in texts]

    def scored(scorer: Scorer) -> Callable[[int], object]:
        return lambda _: scorer.probabilities(asked, answers)

    found = in_turns(repeats, **{name: scored(scorer) for name, scorer in scorers.items()})
    few, many = found.values()
    return {"seconds": {name: round(value, 4) for name, value in found.items()}, "ratio": round(many / few, 3)}


def curves(world: World, repeats: int) -> dict[str, Any]:
    """How step time and memory grow with one thing at a time, with the fast ways of passes and without."""
    result: dict[str, Any] = {}
    for title, axis in CURVES.items():
        ((name, values),) = axis.items()
        result[title] = {}
        for value in values:
            changed = replace(world, **{name: value})
            with tempfile.TemporaryDirectory() as folder:
                save(changed, Path(folder))
                found = race({"ours": ("ours", FAST), "plain": ("ours", PLAIN)}, changed, Path(folder), repeats)
            kept = ("s_per_step", "peak_mb", "phases")
            result[title][str(value)] = {who: {key: own[key] for key in kept} for who, own in found.items()}
            print(title, value, {who: own["s_per_step"] for who, own in found.items()}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument("--sizes", nargs="+", default=["quickstart", "medium"], choices=["quickstart", "medium"])
    parser.add_argument("--repeats", type=int, default=7, help="steps that count, per trainer")
    parser.add_argument("--no-curves", action="store_true", help="leave out the scaling curves")
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -e '.[benchmarks]'")
    result = circumstances()
    result["versions"]["trl"] = version("trl")
    result["threads"] = torch.get_num_threads()
    sizes = worlds()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            save(sizes[size], Path(folder))
            result[size] = {"world": asdict(sizes[size]), **compare(sizes[size], Path(folder), args.repeats)}
        write(args.out, result)
        print(size, json.dumps(result[size], indent=1), flush=True)
    result["heads"] = {size: heads(sizes[size], (1, 8), args.repeats) for size in args.sizes}
    if not args.no_curves:
        result["curves"] = curves(sizes["medium"], 3)
    write(args.out, result)


if __name__ == "__main__":
    main()
