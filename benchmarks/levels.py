"""Question: which loss on five levels, calibrated or not, on which backbone, and how large a classifier?

    pip install -e '.[benchmarks]'
    python benchmarks/levels.py --data DIR --out benchmarks/results/levels.json

Two data sets. ``workbench``: answers of the embedded world with the noisy votes of three raters, tested on exact
levels; a small encoder learns from random weights. ``openassistant``: ``rated_replies.jsonl.gz`` in ``DIR``, the mean
ratings of volunteers, cut into five levels by the preset; MiniLM, frozen (a hidden layer per head, on cached features)
or tuned. A cell is a ``fit`` and a ``test`` of the command line; calibrated and raw figures come from the same weights.
On the workbench the test is best-of-four, too. What is measured is kept under ``--work``, cell by cell: a call that was
stopped goes on there.
Last result: benchmarks/results/levels.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from common import FROZEN, RESULTS, ROOT, circumstances, minilm, once, side_by_side, write
from rated_answers import save_encoder, save_rated
from transformers.utils import logging as transformers_logging

from moslim.cli import run
from moslim.data.types import RowKind, Split
from moslim.workbench.grammar import LEVELS

LOSSES = ("CrossEntropy", "SoftOrdinal", "Corn", "Regression")
RATED = ("quality", "helpfulness")
"""The dimensions of OpenAssistant that are reported; its classifier has the preset's six."""
ENCODER = (64, 2)
"""Width and layers of the encoder on the workbench, where its size is not what is compared."""
SHAPES = ((16, 1), ENCODER, (128, 3))
LABELS = ("votes", "agreed", "exact")
"""Columns of the training table that the workbench's classifier can learn from: soft targets, what the raters come to,
and the truth."""
FEW_ROWS = ["--data.batch_size=64", "--trainer.max_epochs=12"]
"""Heads on features: more steps than the frozen layer's, for so few rows."""

CONFIGS = ("benchmarks/levels_*.yaml", "configs/data/openassistant.yaml", "configs/reward/frozen.yaml")

MEASURED = (Split.TRAIN, Split.VALIDATION, Split.TEST)

Cell = dict[str, Any]
Arm = tuple[str, str, tuple[int, int]] | tuple[str, str]
"""Loss, labels and encoder on the workbench; loss and backbone on OpenAssistant."""


def measured(task: str, heads: Sequence[str], seed: int, options: Sequence[str]) -> Cell:
    """Fits a classifier, tests it, and returns the figures of some of its heads."""
    config = str(ROOT / f"benchmarks/levels_{task}.yaml")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        places = [f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
        cli = run(["fit", "--config", config, *options, *places])
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        result = json.loads((cli.model.run_folder / "reward.json").read_text(encoding="utf-8"))
    best_of = result["best_of"]
    return {
        "heads": {name: head_figures(result, name) for name in heads},
        "best_of": best_of and {"as asked": best_of["accuracy"], "paraphrased": best_of["paraphrases"]["accuracy"]},
        "rows": {split.value: len(cli.datamodule.rows(RowKind.LABELLED, split)) for split in MEASURED},
        "seconds": time.perf_counter() - start,
    }


def head_figures(result: dict[str, Any], name: str) -> dict[str, float]:
    """What is reported of one head; ``raw_`` is without the temperature."""
    head, calibrated = result["dimensions"][name], result["calibration"][name]
    raw = calibrated["uncalibrated"] or calibrated
    low, high = head["interval"]["within_one"]
    return {
        **{key: head[key] for key in ("accuracy", "within_one", "mae", "kappa", "spearman")},
        **{key: calibrated[key] for key in ("rps", "ece", "classwise_ece")},
        **{f"raw_{key}": raw[key] for key in ("rps", "ece", "classwise_ece")},
        "within_one_low": low,
        "within_one_high": high,
        "majority_within_one": result["baseline"][name]["within_one"],
        "majority_accuracy": result["baseline"][name]["accuracy"],
    }


def over_seeds(cells: Sequence[Cell]) -> Cell:
    """Mean over seeds of every figure, and the standard deviation of the means over heads, kappa and RPS."""

    def head(name: str) -> dict[str, float]:
        return {key: round(mean(c["heads"][name][key] for c in cells), 4) for key in cells[0]["heads"][name]}

    def spread(key: str) -> float:
        return round(pstdev(mean(own[key] for own in c["heads"].values()) for c in cells), 4)

    return {
        "seeds": len(cells),
        "rows": cells[0]["rows"],
        "seconds": round(mean(c["seconds"] for c in cells), 1),
        "heads": {name: head(name) for name in cells[0]["heads"]},
        "std": {key: spread(key) for key in ("kappa", "rps")},
        "best_of": cells[0]["best_of"]
        and {key: round(mean(c["best_of"][key] for c in cells), 4) for key in cells[0]["best_of"]},
    }


@dataclass(frozen=True)
class Bench:
    """Runs cells.

    Args:
        work: Where their figures, encoders and cached features are kept.
        data: Folder of OpenAssistant's replies.
        depends: Plain data on which every cell depends.
    """

    work: Path
    data: Path
    depends: Any

    def cell(self, arm: Arm, seed: int) -> Cell:
        """What an arm comes to."""
        return self.workbench(*arm, seed) if len(arm) == 3 else self.openassistant(*arm, seed)

    def workbench(self, loss: str, labels: str, encoder: tuple[int, int], seed: int) -> Cell:
        """A small encoder on the workbench."""
        files = {"path": "train", "validation": "validation", "test": "test"}
        columns = {name: f"{labels}.{name}" for name in LEVELS}
        options = [f"--data.source.{key}={self.work / name}.jsonl" for key, name in files.items()]
        options += [f"--data.source.columns={json.dumps(columns)}", f"--model.backbone={self.encoder(encoder, seed)}"]
        options += [f"--model.loss=moslim.reward.losses.{loss}", f"--model.best_of.path={self.work}/choices.jsonl"]
        name = f"workbench-{loss}-{labels}-{encoder[0]}-{encoder[1]}-{seed}"
        return self._once(name, "workbench", list(LEVELS), seed, options)

    def openassistant(self, loss: str, backbone: str, seed: int) -> Cell:
        """MiniLM on OpenAssistant's replies."""
        frozen = [*FROZEN, *FEW_ROWS, f"--model.cache={self.work / 'features'}"]
        options = frozen if backbone == "frozen" else []
        options += [f"--data.source.path={self.data / 'rated_replies.jsonl.gz'}", "--data.source.test_share=0.3"]
        options += [f"--model.backbone={self.minilm}", f"--model.loss=moslim.reward.losses.{loss}"]
        return self._once(f"openassistant-{loss}-{backbone}-{seed}", "openassistant", RATED, seed, options)

    def encoder(self, shape: tuple[int, int], seed: int) -> Path:
        """Folder of a small encoder."""
        return self.work / "encoder-{}-{}-{}".format(*shape, seed)

    @property
    def minilm(self) -> Path:
        """Folder of MiniLM."""
        return self.work / "encoder"

    def _once(self, name: str, task: str, heads: Sequence[str], seed: int, options: list[str]) -> Cell:
        return once(self.work, name, [self.depends, options], partial(measured, task, heads, seed, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of rated_replies.jsonl.gz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuned-seeds", type=int, nargs="+", default=[0], help="of MiniLM tuned, which takes longest")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/levels-benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS / "levels.json")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    result = circumstances()
    texts = [path.read_text(encoding="utf-8") for name in CONFIGS for path in sorted(ROOT.glob(name))]
    bench = Bench(args.work, args.data, [result["versions"], *texts])
    save_rated(args.work)
    minilm(bench.minilm)
    weights = {
        shape: [save_encoder(bench.encoder(shape, seed), *shape, seed) for seed in args.seeds] for shape in SHAPES
    }
    arms: dict[str, dict[str, Arm]] = {
        "workbench": {loss: (loss, LABELS[0], ENCODER) for loss in LOSSES},
        "labels": {labels: (LOSSES[0], labels, ENCODER) for labels in LABELS},
        "sizes": {"{}x{}".format(*shape): (LOSSES[0], LABELS[0], shape) for shape in SHAPES},
        "frozen": {loss: (loss, "frozen") for loss in LOSSES},
        "tuned": {loss: (loss, "tuned") for loss in LOSSES},
    }
    seeds = {kind: args.tuned_seeds if kind == "tuned" else args.seeds for kind in arms}
    cells = {
        (arm, seed): partial(bench.cell, arm, seed)
        for kind in arms
        for arm in arms[kind].values()
        for seed in seeds[kind]
    }
    bench.cell(arms["frozen"][LOSSES[0]], args.seeds[0])  # makes the cache of features, which the others read
    found = side_by_side(args.jobs, cells)
    for kind, own in arms.items():
        result[kind] = {name: over_seeds([found[arm, seed] for seed in seeds[kind]]) for name, arm in own.items()}
    for shape, cell in zip(SHAPES, result["sizes"].values(), strict=True):
        cell |= {"width": shape[0], "layers": shape[1], "parameters": weights[shape][0]}
    result["openassistant"] = {backbone: result.pop(backbone) for backbone in ("frozen", "tuned")}
    write(args.out, result)


if __name__ == "__main__":
    main()
