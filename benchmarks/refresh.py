"""Question: what does a refresh of the classifier do to the gap between proxy and gold?

    make quickstart
    python benchmarks/refresh.py

The policy of `make quickstart` answers requests, the gold scorer labels its answers, and the classifier goes on with
those to questions about the topics of training (configs/quickstart/refresh.yaml, docs/refresh.md). Proxy (the
classifier's probability of the requested level) and gold (whether the label is that level) are measured with the
classifier as it was and as it became, on the same answers of two kinds: fresh ones about the same topics, and ones
about topics that neither policy nor classifier has met.
Last result: benchmarks/results/refresh.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import REFRESH, quickstart_key
from common import RESULTS, ROOT, circumstances, write

from moslim import PreferenceSet
from moslim.data import Workbench
from moslim.data.prompt_batches import Sweep
from moslim.data.types import RowKind, Split
from moslim.workbench.grammar import LEVELS, gold_levels

POLICY = ["configs/quickstart/policy.yaml"]
REWARD = ["configs/quickstart/reward.yaml"]
LAYERS = [*REWARD, REFRESH]
FOLDER = ROOT / "outputs/quickstart/refresh"
ANSWERS = ROOT / "outputs/quickstart/policy/answers.jsonl"
CLASSIFIERS = {"before": "outputs/quickstart/reward/classifier", "after": "outputs/quickstart/refresh/classifier"}
TABLE = "moslim.data.Table"


def run(verb: str, layers: list[str], seed: int, *options: str) -> None:
    """Runs a command of main.py on some configs."""
    configs = [word for layer in layers for word in ("--config", layer)]
    command = [sys.executable, "main.py", verb, *configs, f"--seed_everything={seed}", *options]
    subprocess.run(command, cwd=ROOT, check=True)


def lines(file: Path) -> list[dict[str, Any]]:
    """Reads JSON Lines."""
    with file.open(encoding="utf-8") as opened:
        return [json.loads(line) for line in opened]


def save(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def requests() -> list[dict[str, Any]]:
    """The level sweep of the policy's own test, on questions about held-out topics."""
    preferences = PreferenceSet(LEVELS)
    questions = Workbench().rows(RowKind.PROMPTS, Split.TEST, preferences, 0)
    sweep = [wanted.levels for wanted in Sweep().preferences(preferences, Workbench(), 0)]
    return [{"question": row.question, **levels} for row in questions for levels in sweep]


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers with gold levels for labels."""
    return [{**row, **gold_levels(row["question"], row["answer"])} for row in rows]


def tested(classifier: str, report: Path, seed: int, *options: str) -> dict[str, Any]:
    """What ``reward.json`` says of a saved classifier."""
    start = ["--model.backbone=null", f"--model.classifier={classifier}", f"--trainer.default_root_dir={FOLDER}"]
    run("test", REWARD, seed, *start, f"--model.report={report}", *options)
    result = json.loads((report / "reward.json").read_text(encoding="utf-8"))
    kept = {"accuracy": result["mean"]["accuracy"], "requests": result["requests"]}
    subsets = {name: part["mean"]["accuracy"] for name, part in result["subsets"].items()}
    return {**kept, "subsets": subsets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="that of the quickstart whose models are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "refresh.json")
    args = parser.parse_args()
    asked = save(FOLDER / "requests.jsonl", requests())
    run("predict", POLICY, args.seed, "--ckpt_path=last", f"--model.predictions={ANSWERS}")
    table = [f"--data.source={TABLE}", f"--data.source.predict={asked}"]
    unseen = FOLDER / "answers.jsonl"
    run("predict", POLICY, args.seed, "--ckpt_path=last", *table, f"--model.predictions={unseen}")
    run("fit", LAYERS, args.seed)
    train, test = (save(FOLDER / f"{f.parent.name}_labelled.jsonl", labelled(lines(f))) for f in (ANSWERS, unseen))
    fresh = [f"--data.source.samples={ANSWERS}"]
    held_out = [f"--data.source={TABLE}", f"--data.source.path={train}", f"--data.source.test={test}"]
    held_out += ["--data.source.requested=requested"]
    result = {
        when: {
            kind: tested(classifier, FOLDER / f"{kind}_{when}", args.seed, *source)
            for kind, source in {"fresh": fresh, "held_out": held_out}.items()
        }
        for when, classifier in CLASSIFIERS.items()
    }
    write(args.out, {**circumstances(), "key": quickstart_key(REFRESH), "seed": args.seed, **result})


if __name__ == "__main__":
    main()
