"""Question: what does each policy optimizer reach on the quickstart's task, with as many rollouts as it has?

    make quickstart
    python benchmarks/optimizers.py --out benchmarks/results/optimizers.json

Trains the policy of `make quickstart` anew, from its starter and classifier, once with every optimizer: RLOO as the
quickstart's own config has it, the others as configs/experiment/ says. Only the optimizer's options differ, and they
were not tuned for this task. A run that is in the result file already, with the same configuration, is not repeated.
Last result: benchmarks/results/optimizers.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, ROOT, circumstances, write

POLICY = "configs/quickstart/policy.yaml"
RUNS = {
    "RLOO": [POLICY],
    "REINFORCE++": [POLICY, "configs/experiment/reinforce_plus_plus.yaml"],
    "GRPO": [POLICY, "configs/experiment/grpo.yaml"],
    "PPO": [POLICY, "configs/experiment/ppo.yaml"],
    "Online DPO": [POLICY, "configs/experiment/online_dpo.yaml"],
}
KEPT = ("dimensions", "mean", "base", "combinations", "reward", "default_quality", "interference")


def command(verb: str, layers: list[str], seed: int, *options: str) -> list[str]:
    """A command line of main.py."""
    configs = [word for layer in layers for word in ("--config", layer)]
    return [sys.executable, "main.py", verb, *configs, f"--seed_everything={seed}", *options]


def key(layers: list[str], seed: int) -> str:
    """What a run is recognised by: a hash of its configuration."""
    contents = [yaml.safe_load((ROOT / layer).read_text(encoding="utf-8")) for layer in layers]
    return hashlib.sha256(json.dumps([contents, seed], sort_keys=True).encode()).hexdigest()[:16]


def folder(layers: list[str], part: str) -> Path:
    """``default_root_dir`` or ``report`` of the last layer that names it."""
    found = ""
    for layer in layers:
        config = yaml.safe_load((ROOT / layer).read_text(encoding="utf-8"))
        place = (
            config.get("trainer", {}) if part == "default_root_dir" else config.get("model", {}).get("init_args", {})
        )
        found = place.get(part, found)
    return ROOT / found


def trained(layers: list[str], seed: int) -> dict[str, Any]:
    """Trains and tests one policy: what the report says, sampled tokens, seconds of training."""
    start = time.perf_counter()
    subprocess.run(command("fit", layers, seed), cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    subprocess.run(command("test", layers, seed, "--ckpt_path", "last"), cwd=ROOT, check=True)
    report = json.loads((folder(layers, "report") / "steerability.json").read_text(encoding="utf-8"))
    return {
        "key": key(layers, seed),
        "seconds": round(seconds, 1),
        "tokens": tokens(folder(layers, "default_root_dir")),
        **{name: report[name] for name in KEPT},
    }


def tokens(runs: Path) -> int:
    """Sampled tokens of the newest run: mean logged length, times its answers."""
    logs = [log for log in runs.glob("version_*/metrics.csv") if "train/length" in log.read_text(encoding="utf-8")]
    newest = max(logs, key=lambda log: log.stat().st_mtime)
    with newest.open(encoding="utf-8", newline="") as file:
        lengths = [float(row["train/length"]) for row in csv.DictReader(file) if row["train/length"]]
    data = yaml.safe_load((newest.parent / "config.yaml").read_text(encoding="utf-8"))
    model, trainer = data["model"]["init_args"], data["trainer"]
    rollouts = trainer["max_steps"] // (model["inner_epochs"] * model["minibatches"])
    answers = rollouts * data["data"]["init_args"]["batch_size"] * model["samples_per_prompt"]
    return round(sum(lengths) / len(lengths) * answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0, help="that of the quickstart whose models are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    args = parser.parse_args()
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result: dict[str, Any] = {**before, **circumstances(), "seed": args.seed}
    for name in args.names:
        if result.get(name, {}).get("key") != key(RUNS[name], args.seed):
            result[name] = trained(RUNS[name], args.seed)
            write(args.out, result)


if __name__ == "__main__":
    main()
