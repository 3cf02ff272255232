"""What ablation.py and optimizers.py share: the quickstart's policy with one config over it, trained and tested.

Every seed has a starter and a classifier of its own, made once by the quickstart's own configs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, ROOT, digest, kept, write

STARTER, REWARD, POLICY = (f"configs/quickstart/{stage}.yaml" for stage in ("starter", "reward", "policy"))
SCRAMBLED, REFRESH = (f"configs/quickstart/{layer}.yaml" for layer in ("scrambled", "refresh"))
PREFERENCES = "configs/preferences/workbench.yaml"
EXPERIMENTS = ROOT / "configs/experiment"
DEFAULT = "default"
MEASURES = ("dimensions", "mean", "combinations", "joint", "cross_talk", "reward", "default_quality", "interference")
"""What is kept of a test's report."""


@dataclass(frozen=True)
class World:
    """A starter and a classifier, as ``make quickstart SEED=...`` makes them.

    Args:
        seed: Of both, and of the policies that stand on them.
        fold: Which third of the topics is held out.
    """

    seed: int
    fold: int

    @property
    def folder(self) -> str:
        """Where everything goes, from the checkout's root."""
        return f"outputs/cells/fold-{self.fold}/seed-{self.seed}"

    @property
    def options(self) -> list[str]:
        """What every command of this world is given."""
        return ["--seed_everything", str(self.seed), "--data.source.fold", str(self.fold)]

    @property
    def models(self) -> list[str]:
        """What a policy's command is given to stand on it."""
        return [
            "--model.model",
            f"{self.folder}/starter/model",
            "--model.classifier",
            f"{self.folder}/reward/classifier",
        ]

    @property
    def mark(self) -> str:
        """A hash of the classifier's weights, which are others on another machine, by rounding alone."""
        files = sorted((ROOT / self.folder / "reward/classifier").rglob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"there is no classifier in {self.folder}: World.make makes it")
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]

    def make(self) -> None:
        """Trains starter and classifier, unless they are there from the same configs."""
        mark, contents = ROOT / self.folder / "made.txt", fingerprint(STARTER, REWARD, PREFERENCES)
        if mark.exists() and mark.read_text() == contents:
            return
        starter, reward = f"{self.folder}/starter", f"{self.folder}/reward"
        samples = f"{starter}/samples.jsonl"
        places = ["--trainer.default_root_dir", starter, "--model.output", f"{starter}/model"]
        places += ["--model.predictions", samples]
        run(["fit", "--config", STARTER, *places, *self.options], starter)
        run(["predict", "--config", STARTER, *places, *self.options, "--ckpt_path", "last"], starter)
        places = ["--trainer.default_root_dir", reward, "--model.output", f"{reward}/classifier"]
        places += ["--model.backbone", f"{starter}/model", "--data.source.samples", samples]
        run(["fit", "--config", REWARD, *places, *self.options], reward)
        mark.write_text(contents)


@dataclass(frozen=True)
class Cell:
    """One policy.

    Args:
        arm: What differs from the quickstart: a file under configs/experiment/, without its ending, or ``default``.
        world: What it stands on.
        purpose: Name of the folder that its result is kept in.
        rollouts: How often prompts are answered and learnt from; the schedule of the rate is as long. None = as the
            configs say.
    """

    arm: str
    world: World
    purpose: str
    rollouts: int | None = None

    @property
    def layers(self) -> list[str]:
        """The configs, the quickstart's first."""
        return [POLICY] if self.arm == DEFAULT else [POLICY, f"configs/experiment/{self.arm}.yaml"]

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RESULTS / self.purpose / f"{self.arm.replace('/', '-')}-{self.world.seed}.json"

    @property
    def kept(self) -> dict[str, Any] | None:
        """Its result, where there is one from the configs as they are now."""
        return kept(self.file, self.key)

    @property
    def stands(self) -> bool:
        """Whether there is a result, and of the models that are there now."""
        return self.kept is not None and self.kept.get("world") == self.world.mark

    @property
    def key(self) -> str:
        """What a result is recognised by: a hash of all that its configs say, those of its classifier included."""
        contents = [read(layer) for layer in self.layers]
        for content in contents:
            content["trainer"].pop("max_steps", None)
        return digest(
            [fingerprint(STARTER, REWARD, PREFERENCES), contents, self.steps, self.world.seed, self.world.fold]
        )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self._option("trainer.max_steps") if self.rollouts is None else self.rollouts * self._repeats

    @property
    def answers(self) -> int:
        """Sampled in training: every arm's are as many."""
        rollouts = self.steps // self._repeats
        return rollouts * self._option("data.batch_size") * self._option("model.num_generations")

    def result(self) -> dict[str, Any]:
        """Trains and tests it: what the report says, tokens sampled, seconds of training."""
        folder = f"{self.world.folder}/{self.purpose}/{self.arm}"
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        options = [word for layer in self.layers for word in ("--config", layer)]
        options += ["--trainer.default_root_dir", folder, "--model.report", f"{folder}/report"]
        options += ["--trainer.max_steps", str(self.steps), *self.world.models, *self.world.options]
        key, start = self.key, time.perf_counter()
        run(["fit", *options], folder)
        seconds = time.perf_counter() - start
        run(["test", *options, "--ckpt_path", "last"], folder)
        report = json.loads((ROOT / folder / "report/steerability.json").read_text(encoding="utf-8"))
        return {
            "key": key,
            "world": self.world.mark,
            "answers": self.answers,
            "tokens": round(mean_length(ROOT / folder) * self.answers),
            "seconds": round(seconds, 1),
            **{name: report[name] for name in MEASURES},
        }

    @property
    def _repeats(self) -> int:
        return self._option("model.num_iterations", 1) * self._option("model.minibatches", 1)

    def _option(self, key: str, default: int | None = None) -> int:
        """What the last layer that names an option says."""
        part, name = key.split(".")
        blocks = [read(layer).get(part, {}) for layer in self.layers]
        found = [block.get("init_args", block).get(name) for block in blocks]
        return next((value for value in reversed(found) if value is not None), default)


def run_arms(
    description: str | None, every: Sequence[str], purpose: str, fold: int, rollouts: int | None = None
) -> tuple[Path, dict[str, list[Cell]]]:
    """Reads the options of a benchmark over arms and seeds, and runs the cells that have no result yet.

    Args:
        description: Text of ``--help``.
        every: All arms.
        purpose: Name of the result, and of the folder that the cells are kept in.
        fold: Which third of the topics is held out.
        rollouts: See :class:`Cell`.

    Returns:
        The file for the result, and the cells of every arm, seed by seed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=every, choices=every, metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one thread")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, help="no cell is begun after these")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{purpose}.json")
    args = parser.parse_args()
    cells = {arm: [Cell(arm, World(seed, fold), purpose, rollouts) for seed in args.seeds] for arm in every}
    by_seed = zip(*(cells[arm] for arm in args.arms), strict=True)
    finish([cell for row in by_seed for cell in row], args.jobs, args.limit_minutes)
    return args.out, cells


def failures(cells: dict[str, list[Cell]]) -> dict[str, str]:
    """Reasons of the cells that a guard or a gate stopped, by arm and seed."""
    stopped = [cell for of_arm in cells.values() for cell in of_arm if "failed" in (cell.kept or {})]
    return {f"{cell.arm}, seed {cell.world.seed}": cell.kept["failed"] for cell in stopped}


def read(config: str) -> dict[str, Any]:
    """A config's contents."""
    return yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))


def fingerprint(*configs: str) -> str:
    """A hash of what configs say; comments and the order of keys do not matter."""
    return digest([read(one) for one in configs])


def quickstart_key(*more: str) -> str:
    """What a result on a quickstart's models is recognised by: a hash of what its configs, and ``more``, say."""
    return fingerprint(STARTER, REWARD, POLICY, PREFERENCES, *more)


def arms() -> dict[str, list[str]]:
    """Every arm by what it changes: the folders in configs/experiment/ and the files in them."""
    folders = sorted(path for path in EXPERIMENTS.iterdir() if path.is_dir())
    return {folder.name: [f"{folder.name}/{file.stem}" for file in sorted(folder.glob("*.yaml"))] for folder in folders}


def run(arguments: list[str], folder: str) -> None:
    """Runs main.py on one thread; what it prints goes to ``log.txt`` in the folder."""
    log = ROOT / folder / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "main.py", *arguments]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-20:]
        if refusals := [line for line in said if "GuardError: " in line or "GateError: " in line]:
            raise Refused(refusals[-1])
        raise RuntimeError(f"a command ended early, see {log}: {said[-1]}")


class Refused(Exception):
    """A guard or a gate stopped a command, and would do so again. Holds what it said."""


def mean_length(folder: Path) -> float:
    """Tokens per answer, over all logged steps of a training."""
    (log,) = (path for path in folder.glob("version_*/metrics.csv") if "train/length" in path.read_text("utf-8"))
    with log.open(encoding="utf-8", newline="") as file:
        lengths = [float(row["train/length"]) for row in csv.DictReader(file) if row["train/length"]]
    return sum(lengths) / len(lengths)


def finish(cells: Sequence[Cell], jobs: int, minutes: float) -> None:
    """Runs the cells that have no result yet, side by side, and keeps each one's result at once.

    Cells are compared within their world. So where some are missing whose world is no longer there, as on another
    machine, all that stood on it are run anew.

    Args:
        cells: All of them.
        jobs: Cells at a time.
        minutes: None is begun after these.
    """
    start = time.monotonic()

    def one(cell: Cell) -> None:
        if time.monotonic() - start < 60 * minutes:
            try:
                result = cell.result()
            except Refused as failure:
                result = {"key": cell.key, "world": cell.world.mark, "failed": str(failure)}
            write(cell.file, result)
            found = result.get("failed") or f"Spearman {result['mean']['spearman']:.3f}"
            print(f"{cell.arm}, seed {cell.world.seed}: {found}", flush=True)

    worlds = dict.fromkeys(cell.world for cell in cells if cell.kept is None)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(World.make, worlds))
        list(pool.map(one, [cell for cell in cells if cell.world in worlds and not cell.stands]))
