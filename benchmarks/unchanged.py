"""Question: do two checkouts of this project compute the same numbers?

    python benchmarks/unchanged.py --before CHECKOUT

Runs, in the checkout given and in this one, ``make quickstart`` and the test of its classifier, and 20 steps of each
policy optimizer on the first quickstart's starter and classifier. Compares everything that the runs leave: reports,
logged metrics, weights, texts. Numbers must be the same to the last bit; measured times and sizes are left out. Names
may differ: ``RENAMES`` says how. A command that has ended is not run again with ``--reuse``, so each side can be run
on its own: ``--only before`` runs without comparing. ``--seed-after 1`` shows that a difference is seen.
Last result: benchmarks/results/unchanged.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import quickstart_key
from common import RESULTS, ROOT, circumstances, write
from safetensors.torch import load_file

POLICY = "configs/quickstart/policy.yaml"
LAYER = "configs/experiment/optimizer/{}.yaml"


@dataclass(frozen=True)
class Names:
    """The files and options of one checkout.

    Args:
        algorithms: Configs of each policy optimizer, layered.
        model: Option that names the starter's folder.
        classifier: Option that names the classifier's folder.
        test: The classifier's test.
        own_start: Whether the algorithms start from this checkout's own quickstart, not the other's. Set it if the
            format of a model's folder has changed.
    """

    algorithms: dict[str, list[str]]
    model: str = "--model.model"
    classifier: str = "--model.classifier"
    test: str = "test --config configs/quickstart/reward.yaml --ckpt_path last"
    own_start: bool = False


BEFORE = Names(
    {
        "rloo": [POLICY],
        "grpo": [POLICY, LAYER.format("grpo")],
        "ppo": [POLICY, LAYER.format("ppo")],
        "reinforce_plus_plus": [POLICY, LAYER.format("reinforce_plus_plus")],
        "online_dpo": [POLICY, LAYER.format("online_dpo")],
    }
)
AFTER = Names(BEFORE.algorithms)

RENAMES: tuple[tuple[str, str], ...] = (
    (r"(?<=steerability\.json: config/)samples_per_prompt$", "num_generations"),
    (r"(?<=steerability\.json: config/)eval_samples$", "eval_num_generations"),
    (r"(?<=steerability\.json: config/)missing_end_penalty$", "missing_eos_penalty"),
    (r"(?<=steerability\.json: config/policy_optimizer/)clip_low$", "epsilon_low"),
    (r"(?<=steerability\.json: config/policy_optimizer/)clip_high$", "epsilon_high"),
)
"""Regular expressions and replacements, applied in this order to the names of the first checkout's values. A name is
``file: what``: ``quickstart/report/steerability.json: dimensions/warmth/mae``, ``ppo/metrics.csv: train/loss at
3``, ``ppo/last.ckpt: policy.lm_head.weight``, ``quickstart/starter/samples.jsonl: 0/question``."""

MEASURED = re.compile(r": (\w+/)*(time|speed|memory|throughput|seconds)\b|: (epoch|created|date|version)\b")
"""Names of values that differ between two runs of one checkout, as times do."""
NAMED = re.compile(r"steerability\.json: config/|: (weights|checkpoint|path)s?\b")
"""Names of values that say how a run was set up: texts among them may differ, and options may come and go."""

STAGES = ("quickstart", "algorithms")
STARTER, CLASSIFIER = "outputs/quickstart/starter/model", "outputs/quickstart/reward/classifier"
TRAINER = "--trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false"
FILES = {
    "quickstart": (
        "steerability.json",
        "reward.json",
        "metrics.csv",
        "last.ckpt",
        "samples.jsonl",
        "model*.safetensors",
    ),
    "algorithms": ("metrics.csv", "last.ckpt"),
}
"""The files of a stage that are compared, and that its runs must have left."""


@dataclass(frozen=True)
class Side:
    """One checkout and the folder of its runs.

    Args:
        checkout: Its root.
        outputs: Working folder of its commands, with a folder for each stage.
        names: What its files and options are called.
        start: The ``outputs`` of the side whose starter and classifier the algorithms start from.
        seed: Of every run.
    """

    checkout: Path
    outputs: Path
    names: Names
    start: Path
    seed: int

    def commands(self, stage: str, steps: int) -> list[list[str]]:
        """The arguments of main.py, command by command; files of the checkout as whole paths."""
        seed = ["--seed_everything", str(self.seed)]
        if stage == "quickstart":
            make = ["make", "--dry-run", "--silent", "quickstart", f"SEED={self.seed}"]
            recipe = subprocess.run(make, cwd=self.checkout, check=True, capture_output=True, text=True).stdout
            lines = [shlex.split(line) for line in recipe.splitlines() if "main.py" in line]
            given = [line[line.index("main.py") + 1 :] for line in lines]
            given.append([*self.names.test.split(), *seed])
        else:
            models = [self.names.model, str(self.start / "quickstart" / STARTER)]
            models += [self.names.classifier, str(self.start / "quickstart" / CLASSIFIER)]
            given = []
            for name, configs in self.names.algorithms.items():
                layers = [word for config in configs for word in ("--config", config)]
                run = ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", f"outputs/{name}"]
                given.append(["fit", *layers, *TRAINER.split(), *run, *models, *seed])
        return [[self._whole(word) for word in command] for command in given]

    def run(self, stage: str, steps: int, reuse: bool) -> None:
        """Runs the commands of a stage, except those that have ended if ``reuse``."""
        folder = self.outputs / stage
        record = folder / "ended.txt"
        folder.mkdir(parents=True, exist_ok=True)
        if not reuse and any(folder.iterdir()):
            raise SystemExit(f"{folder} holds an earlier run: remove it, or give --reuse")
        ended = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = str(self.checkout / "src")
        for command in self.commands(stage, steps):
            line = shlex.join(command)
            if line in ended:
                continue
            print("+", line, flush=True)
            subprocess.run(
                [sys.executable, self.checkout / "main.py", *command], cwd=folder, env=environment, check=True
            )
            with record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def values(self, stage: str) -> dict[str, Any]:
        """Everything that the runs of a stage have left, by name."""
        root = self.outputs / stage / "outputs"
        found: dict[str, Any] = {}
        for pattern in FILES[stage]:
            files = sorted(root.rglob(pattern))
            if not files:
                raise SystemExit(f"there is no {pattern} below {root}: run the stage {stage} first")
            for file in files:
                place = re.sub(r"/(version_\d+|checkpoints)(?=/)", "", str(file.relative_to(root)))
                for name, value in READERS[file.suffix](file):
                    found.setdefault(f"{place}: {name}", []).append(value)
        return {name: values for name, values in found.items() if not MEASURED.search(name)}

    def _whole(self, word: str) -> str:
        file = self.checkout / word
        return str(file) if file.is_file() else word


@dataclass(frozen=True)
class Weights:
    """A tensor, as a hash of its bytes."""

    shape: tuple[int, ...]
    kind: str
    digest: str


def of_tensors(tensors: dict[str, Any]) -> Iterator[tuple[str, Weights]]:
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        contents = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        yield name, Weights(tuple(plain.shape), str(plain.dtype), hashlib.sha256(contents).hexdigest()[:16])


def of_json(contents: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of JSON data, each with its path."""
    if isinstance(contents, dict | list):
        pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in pairs:
            yield from of_json(value, f"{name}/{key}" if name else str(key))
    else:
        yield name, contents


def of_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    yield from of_json([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])


def of_metrics(file: Path) -> Iterator[tuple[str, Any]]:
    """Every value that a logger has written, by metric and step."""
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            for metric, value in row.items():
                if value and metric != "step":
                    yield f"{metric} at {row['step']}", float(value)


READERS: dict[str, Any] = {
    ".json": lambda file: of_json(json.loads(file.read_text(encoding="utf-8"))),
    ".jsonl": of_json_lines,
    ".csv": of_metrics,
    ".ckpt": lambda file: of_tensors(torch.load(file, map_location="cpu", weights_only=True)["state_dict"]),
    ".safetensors": lambda file: of_tensors(load_file(file)),
}


def renamed(name: str) -> str:
    """What the second checkout calls a value of the first."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def compare(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> dict[str, Any]:
    """Compares values name by name; a text, a truth value and an absent one count as no numbers.

    Returns:
        ``numbers`` and ``texts`` that were compared, weights counting one by one, and what differs: ``different`` with
        both values, and names that only one side has: ``options``, and ``only_before`` and ``only_after`` of results.
    """
    before = {renamed(name): values for name, values in before.items()}
    numbers = texts = 0
    different = []
    for name in before.keys() & after.keys():
        first, second = before[name], after[name]
        if all(isinstance(value, str) for value in first) and NAMED.search(name):
            continue
        for value in first:
            texts += isinstance(value, str)
            numbers += math.prod(value.shape) if isinstance(value, Weights) else type(value) in (int, float)
        if not (len(first) == len(second) and all(map(same, first, second))):
            different.append({"name": name, "before": str(first), "after": str(second)})
    alone = [sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())]
    only_before, only_after = ([name for name in names if not NAMED.search(name)] for names in alone)
    return {
        "numbers": numbers,
        "texts": texts,
        "different": sorted(different, key=lambda one: one["name"]),
        "only_before": only_before,
        "only_after": only_after,
        "options": [name for names in alone for name in names if NAMED.search(name)],
    }


def same(first: Any, second: Any) -> bool:
    """Whether two values are equal to the last bit; NaN equals NaN."""
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    return type(first) is type(second) and first == second


def commit(checkout: Path) -> str:
    """The commit of a checkout, with ``+`` if files differ from it."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain", "src", "configs"], capture_output=True, text=True).stdout
    return head.strip() + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT", help="root of the other checkout")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="CHECKOUT", help="root of this one")
    parser.add_argument("--before-outputs", type=Path, default=ROOT / "outputs/unchanged/before")
    parser.add_argument("--after-outputs", type=Path, default=ROOT / "outputs/unchanged/after")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seed-after", type=int, help="another seed for the second checkout: nothing is equal then")
    parser.add_argument("--only", choices=("before", "after"), help="runs one side and compares nothing")
    parser.add_argument("--reuse", action="store_true", help="do not run commands again that have ended")
    parser.add_argument("--out", type=Path, default=RESULTS / "unchanged.json")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    first, second = args.before_outputs.resolve(), args.after_outputs.resolve()
    seed_after = args.seed if args.seed_after is None else args.seed_after
    sides = {
        "before": Side(args.before.resolve(), first, BEFORE, first, args.seed),
        "after": Side(args.after.resolve(), second, AFTER, second if AFTER.own_start else first, seed_after),
    }
    for name, side in sides.items():
        for stage in stages:
            if args.only in (None, name):
                side.run(stage, args.steps, args.reuse)
    if args.only:
        return
    configs = sorted({config for layers in AFTER.algorithms.values() for config in layers if config != POLICY})
    result: dict[str, Any] = {
        **circumstances(),
        "command": "python benchmarks/unchanged.py --before CHECKOUT",
        "key": quickstart_key(*configs),
        "configs": configs,
        "commits": {name: commit(side.checkout) for name, side in sides.items()},
        "seeds": {name: side.seed for name, side in sides.items()},
        "steps": args.steps,
        "renames": [list(pair) for pair in RENAMES],
        "stages": {s: compare(sides["before"].values(s), sides["after"].values(s)) for s in stages},
    }
    write(args.out, result)
    equal = True
    for stage, found in result["stages"].items():
        print(f"{stage}: {found['numbers']} numbers and {found['texts']} texts compared")
        for kind in ("different", "only_before", "only_after", "options"):
            equal &= kind == "options" or not found[kind]
            print(f"  {kind}: {len(found[kind])}")
            for one in found[kind][:20]:
                print("    ", one)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
