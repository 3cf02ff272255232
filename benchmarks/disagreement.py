"""Question: what do comparisons add to labels, and their margins where raters disagree, to comparisons?

    pip install -e '.[benchmarks]'
    python benchmarks/disagreement.py --data DIR --out benchmarks/results/disagreement.json

``DIR`` holds the folders ``truthfulqa_judge`` and ``oasst1_en_validation``. Of two answers to one question, the one
that raters put higher on a dimension was preferred; its margin is the difference of their mean votes
(:class:`~moslim.data.ComparisonsFromRatings`). Three arms learn from the same rows: from labels and votes alone, from
comparisons as well, and with their margins. All are tested on comparisons of held-out questions, and best of four: on
TruthfulQA one answer of each combination of labels, each in turn asked for. What is measured is kept under ``--work``.
Last result: benchmarks/results/disagreement.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import yaml
from common import FROZEN, RESULTS, ROOT, circumstances, minilm, once, side_by_side, write
from rated_answers import save_encoder, save_rated, write_lines
from transformers.utils import logging as transformers_logging
from truthfulqa import HEADS, Rows, split

from moslim.cli import run
from moslim.workbench.grammar import LEVELS

ARMS = {
    "labels alone": ["--model.pairs.weight=0"],
    "and comparisons": ["--model.pairs.margin_scale=0"],
    "with margins": ["--model.pairs.margin_scale=1"],
}
RIVALS = "moslim.data.ComparisonsFromRatings"
TABLE = "moslim.data.Table"


@dataclass(frozen=True)
class Task:
    """Data with votes on a dimension, and what learns from them.

    Args:
        config: A layer with the data module and the model.
        dimension: What is compared.
        table: Arguments of the Table.
        options: What else the command line says; layers first.
    """

    config: str
    dimension: str
    table: dict[str, Any]
    options: list[str]


def four_of_a_kind(rows: Rows) -> list[dict[str, Any]]:
    """Prompts of a best-of-four test: an answer of each combination of labels, where a question has all four."""
    by_question: dict[str, dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_question[row["question"]][tuple(row[head] for head in HEADS)].append(row["answer"])
    rng, prompts = random.Random(0), []
    for question, kinds in by_question.items():
        if len(kinds) < 4:
            continue
        answers = [rng.choice(kinds[levels]) for levels in sorted(kinds)]
        for right, levels in enumerate(sorted(kinds)):
            preference = dict(zip(HEADS, levels, strict=True))
            prompts.append({"question": question, "answers": answers, "preference": preference, "right": right})
    return prompts


def tasks(data: Path, work: Path) -> dict[str, Task]:
    """Writes tables, encoders and prompts, and says what to do with them."""
    for name in ("truthfulqa", "world"):
        (work / name).mkdir(parents=True, exist_ok=True)
    rows = split(data / "truthfulqa_judge", work / "truthfulqa")
    write_lines(work / "truthfulqa/choices.jsonl", four_of_a_kind(rows["test"]))
    save_rated(work / "world")
    save_encoder(work / "world/encoder", 64, 2, seed=0)
    encoder = minilm(work / "minilm")

    def files(name: str) -> dict[str, str]:
        parts = {"path": "train", "validation": "validation", "test": "test"}
        return {key: str(work / name / f"{part}.jsonl") for key, part in parts.items()}

    def frozen(name: str) -> list[str]:
        return [*FROZEN, f"--model.backbone={encoder}", f"--model.cache={work / name / 'features'}"]

    openassistant = yaml.safe_load((ROOT / "configs/data/openassistant.yaml").read_text(encoding="utf-8"))["init_args"]
    openassistant |= {"path": str(data / "oasst1_en_validation/rated_replies.jsonl.gz"), "test_share": 0.3}
    votes = {head: f"{head}_votes" for head in HEADS}
    return {
        "TruthfulQA": Task(
            "truthfulqa.yaml",
            "truthful",
            {**files("truthfulqa"), "columns": votes},
            [*frozen("truthfulqa"), f"--model.best_of.path={work}/truthfulqa/choices.jsonl"],
        ),
        "OpenAssistant": Task(
            "levels_openassistant.yaml",
            "fails_task",
            openassistant,
            [*frozen("openassistant"), "--data.batch_size=64", "--trainer.max_epochs=12"],
        ),
        "embedded world": Task(
            "levels_workbench.yaml",
            "helpfulness",
            {**files("world"), "columns": {name: f"votes.{name}" for name in LEVELS}},
            [f"--model.backbone={work}/world/encoder", f"--model.best_of.path={work}/world/choices.jsonl"],
        ),
    }


def measured(task: Task, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Fits a classifier, tests it, and returns the figures of the dimension compared."""
    folder.mkdir(parents=True, exist_ok=True)
    source = {"source": {"class_path": TABLE, "init_args": task.table}, "dimension": task.dimension}
    layer = folder / "rivals.yaml"
    rivals = {"data": {"init_args": {"source": {"class_path": RIVALS, "init_args": source}}}}
    layer.write_text(yaml.safe_dump(rivals), encoding="utf-8")
    start = time.perf_counter()
    configs = ["--config", str(ROOT / "benchmarks" / task.config), *task.options, "--config", str(layer)]
    places = [f"--trainer.default_root_dir={folder}", f"--seed_everything={seed}"]
    cli = run(["fit", *configs, "--model.pairs=moslim.reward.BradleyTerry", *ARMS[arm], *places])
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    result = json.loads((cli.model.run_folder / "reward.json").read_text(encoding="utf-8"))
    pairs, head = result["pairs"]["dimensions"][task.dimension], result["dimensions"][task.dimension]
    return {
        "comparisons": pairs["n_pairs"],
        "pair_accuracy": pairs["accuracy"],
        "interval": pairs["interval"],
        "accuracy": head["accuracy"],
        "auroc": head["auroc"],
        "kappa": head["kappa"],
        "rps": result["calibration"][task.dimension]["rps"],
        "best_of": result["best_of"] and result["best_of"]["accuracy"],
        "prompts": result["best_of"] and result["best_of"]["n_prompts"],
        "seconds": time.perf_counter() - start,
    }


def over_seeds(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of every figure, the first seed's interval, and the spread of the accuracy on comparisons."""
    named = {key: value for key, value in cells[0].items() if key != "interval"}
    means = {key: None if value is None else round(mean(c[key] for c in cells), 4) for key, value in named.items()}
    spread = round(pstdev(cell["pair_accuracy"] for cell in cells), 4)
    return {"seeds": len(cells), **means, "interval": cells[0]["interval"], "pair_accuracy_std": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of both data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="classifiers at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/disagreement-benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS / "disagreement.json")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    found, result = tasks(args.data, args.work), circumstances()

    def cell(name: str, arm: str, seed: int) -> partial[Any]:
        folder = args.work / "runs" / f"{name}-{arm}-{seed}".replace(" ", "-")
        config = (ROOT / "benchmarks" / found[name].config).read_text(encoding="utf-8")
        settings = [result["versions"], config, repr(found[name]), ARMS[arm], seed]
        return partial(once, args.work, folder.name, settings, partial(measured, found[name], arm, seed, folder))

    first = [name for name, task in found.items() if FROZEN[1] in task.options]
    arm, seed = next(iter(ARMS)), args.seeds[0]
    side_by_side(args.jobs, {name: cell(name, arm, seed) for name in first})  # makes features that others read
    cells = {(name, arm, seed): cell(name, arm, seed) for name in found for arm in ARMS for seed in args.seeds}
    figures = side_by_side(args.jobs, cells)
    result["tasks"] = {
        name: {
            "dimension": task.dimension,
            "arms": {arm: over_seeds([figures[name, arm, seed] for seed in args.seeds]) for arm in ARMS},
        }
        for name, task in found.items()
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
