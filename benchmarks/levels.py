"""Question: which loss on five levels, calibrated or not, on which trunk, and how large a classifier?

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
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from common import FROZEN, RESULTS, ROOT, circumstances, minilm, once, write
from rated_answers import save_encoder, save_rated
from transformers.utils import logging as transformers_logging

from moslim.cli import run
from moslim.data.types import Split, View
from moslim.workbench.grammar import LEVELS

LOSSES = ("CrossEntropy", "SoftOrdinal", "Corn", "Regression")
RATED = ("quality", "helpfulness")
"""The dimensions of OpenAssistant that are reported; its classifier has the preset's six."""
ENCODER = (64, 2)
"""Width and layers of the encoder on the workbench, where its size is not what is compared."""
ENCODERS = ((16, 1), ENCODER, (128, 3))
LABELS = ("votes", "agreed", "exact")
"""Columns of the training table that the workbench's classifier can learn from: soft targets, what the raters come to,
and the truth."""
FEW_ROWS = ["--data.batch_size=64", "--trainer.max_epochs=12"]
"""Heads on features: more steps than the frozen layer's, for so few rows."""

CONFIGS = ("benchmarks/levels_*.yaml", "configs/data/openassistant.yaml", "configs/reward/frozen.yaml")

MEASURED = (Split.TRAIN, Split.VALIDATION, Split.TEST)

Cell = dict[str, Any]


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
        "rows": {split.value: len(cli.datamodule.rows(View.REWARD, split)) for split in MEASURED},
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


class Bench:
    """Runs cells.

    Args:
        work: Where their figures, encoders and cached features are kept.
        data: Folder of OpenAssistant's replies.
        depends: Plain data on which every cell depends.
    """

    def __init__(self, work: Path, data: Path, depends: Any) -> None:
        self.work, self.data, self.depends = work, data, depends
        save_rated(work)

    def workbench(self, loss: str, seed: int, labels: str = "votes", encoder: tuple[int, int] = ENCODER) -> Cell:
        """A small encoder on the workbench; its ``parameters`` as well."""
        width, layers = encoder
        backbone = self.work / f"encoder-{width}-{layers}-{seed}"
        parameters = save_encoder(backbone, width, layers, seed)
        files = {"path": "train", "validation": "validation", "test": "test"}
        columns = {name: f"{labels}.{name}" for name in LEVELS}
        options = [f"--data.source.{key}={self.work / name}.jsonl" for key, name in files.items()]
        options += [f"--data.source.columns={json.dumps(columns)}", f"--model.backbone={backbone}"]
        options += [f"--model.loss=moslim.reward.losses.{loss}", f"--model.best_of.path={self.work}/choices.jsonl"]
        name = f"workbench-{loss}-{labels}-{width}-{layers}-{seed}"
        return {**self._once(name, "workbench", list(LEVELS), seed, options), "parameters": parameters}

    def openassistant(self, loss: str, seed: int, frozen: bool) -> Cell:
        """MiniLM on OpenAssistant's replies."""
        options = [*FROZEN, *FEW_ROWS, f"--model.cache={self.work / 'features'}"] if frozen else []
        options += [f"--data.source.path={self.data / 'rated_replies.jsonl.gz'}", "--data.source.test_share=0.3"]
        options += [f"--model.backbone={minilm(self.work / 'encoder')}", f"--model.loss=moslim.reward.losses.{loss}"]
        name = f"openassistant-{loss}-{'frozen' if frozen else 'tuned'}-{seed}"
        return self._once(name, "openassistant", RATED, seed, options)

    def _once(self, name: str, task: str, heads: Sequence[str], seed: int, options: list[str]) -> Cell:
        return once(self.work, name, [self.depends, options], partial(measured, task, heads, seed, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of rated_replies.jsonl.gz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuned-seeds", type=int, nargs="+", default=[0], help="of MiniLM tuned, which takes longest")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/levels-benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS / "levels.json")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    result = circumstances()
    texts = [path.read_text(encoding="utf-8") for name in CONFIGS for path in sorted(ROOT.glob(name))]
    bench = Bench(args.work, args.data, [result["versions"], *texts])
    seeds, tuned = args.seeds, args.tuned_seeds
    result["workbench"] = {loss: over_seeds([bench.workbench(loss, seed) for seed in seeds]) for loss in LOSSES}
    result["labels"] = {
        labels: over_seeds([bench.workbench(LOSSES[0], seed, labels) for seed in seeds]) for labels in LABELS
    }
    result["sizes"] = {}
    for encoder in ENCODERS:
        cells = [bench.workbench(LOSSES[0], seed, encoder=encoder) for seed in seeds]
        shape = {"width": encoder[0], "layers": encoder[1], "parameters": cells[0]["parameters"]}
        result["sizes"]["x".join(map(str, encoder))] = {**shape, **over_seeds(cells)}
    result["openassistant"] = {
        trunk: {
            loss: over_seeds([bench.openassistant(loss, seed, trunk == "frozen") for seed in own]) for loss in LOSSES
        }
        for trunk, own in (("frozen", seeds), ("tuned", tuned))
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
