"""Question: what do the fast ways give the quickstart's policy stage, and what does sampling one step ahead cost it?

    make quickstart
    python benchmarks/policy_stage.py --seeds 0

Trains and tests the quickstart's policy as shipped, with every fast way switched off (``PLAIN`` in throughput.py), and
with the answers to the next batch sampled while the current ones are learnt from: the same starter, classifier, steps
and seed. What is measured is kept under ``--work``, run by run, until the source changes.
Last result: benchmarks/results/policy_stage.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from cells import POLICY, quickstart_key
from common import RESULTS, ROOT, circumstances, once, source_digest, write
from throughput import PLAIN

FORMS: dict[str, list[str]] = {
    "as shipped": [],
    "every fast way off": [
        *(f"--model.{name}={json.dumps(PLAIN.settings[name])}" for name in ("forward_config", "off_policy")),
        f"--model.engine.decoding={json.dumps(PLAIN.settings['decoding'])}",
    ],
    "one step off": ["--config", "configs/engine/one_step_off.yaml"],
}


def stage(work: Path, form: str, seed: int) -> dict[str, Any]:
    """Trains and tests one policy: seconds, where they went, and how well it is steered."""
    folder = work / form.replace(" ", "_") / str(seed)
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
    command = [sys.executable, "main.py", "fit", "--config", POLICY, *FORMS[form]]
    command += [f"--trainer.default_root_dir={folder}", f"--model.report={folder}/report", f"--seed_everything={seed}"]
    command += ["--trainer.enable_progress_bar=false"]
    seconds, cpu = _run(command)
    command[2] = "test"
    _run([*command, "--ckpt_path", "last"])
    report = json.loads((folder / "report/steerability.json").read_text(encoding="utf-8"))
    return {
        "fit_s": round(seconds, 1),
        "fit_cpu_s": round(cpu, 1),
        "phases": _means(folder, "time/"),
        "off_policy": _means(folder, "train/off_policy/"),
        "mean": report["mean"],
        "base": report["base"]["mean"],
    }


def speedups(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By seed: seconds, and CPU seconds, with every fast way off, over those of the policy as shipped."""
    shipped, off = list(FORMS)[:2]
    both = {seed: runs for seed, runs in made.items() if {shipped, off} <= runs.keys()}
    return {
        seed: {key: round(runs[off][key] / runs[shipped][key], 2) for key in ("fit_s", "fit_cpu_s")}
        for seed, runs in both.items()
    }


def _run(command: list[str]) -> tuple[float, float]:
    """Runs a command; its seconds, and those of all its threads."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def _means(folder: Path, prefix: str) -> dict[str, float]:
    """Means over the logged training steps of the metrics that begin so."""
    with min(folder.glob("version_*/metrics.csv")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(prefix)]
    found = {name: [float(row[name]) for row in rows if row[name]] for name in names}
    return {name.removeprefix(prefix): round(sum(own) / len(own), 4) for name, own in found.items() if own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/policy_stage")
    parser.add_argument("--out", type=Path, default=RESULTS / "policy_stage.json")
    args = parser.parse_args()
    made: dict[str, dict[str, Any]] = {}
    here = circumstances()
    depends = [here["versions"], here["machine"], source_digest(), quickstart_key()]
    for seed in args.seeds:
        for form in args.forms:
            measure = partial(stage, args.work, form, seed)
            made.setdefault(str(seed), {})[form] = once(args.work, f"{form}-{seed}", [depends, FORMS[form]], measure)
            write(args.out, {**here, "key": quickstart_key(), "speedup": speedups(made), "runs": made})


if __name__ == "__main__":
    main()
