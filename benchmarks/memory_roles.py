"""Question: what memory does one backbone for all roles save over separate models?

    python benchmarks/memory_roles.py

A Llama architecture with random weights (no downloads) is the start of policy, reference, classifier and critic, with
PPO. Each form runs in a process of its own, through the `PolicyTrainer` and its command line's callbacks:

- `shared`: adapters of policy and classifier on one base, reference = adapters off, critic = head on the backbone
- `classifier apart`: the same, but the classifier merged, with a backbone of its own
- `full`: all weights are trained, so the reference is a copy; the classifier has a backbone of its own
- `four models`: as `full`, and a critic with a backbone of its own, as most implementations of PPO have it. The
  `PolicyTrainer` has no such critic, so that this form is only loaded and takes no step

`weights` are the storages of all parameters that the process holds, each counted once; they are found through the
garbage collector, not through the accounting under test. What is `resident` is the whole process's, as the kernel tells
it: its growth by loading the models and reading every weight once, and its `peak` in one training step. Linux only.
Last result: benchmarks/results/memory_roles.json.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write
from lightning.pytorch import Trainer
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moslim import PolicyTrainer, PreferenceDataModule, PreferenceSet
from moslim.algorithms import PPO
from moslim.callbacks.monitors import FILE, RoleMemory, resident_bytes
from moslim.data import Workbench
from moslim.generation import TorchEngine
from moslim.mapping import ExpectedDistance
from moslim.ops import Architecture, WorkbenchTokenizer
from moslim.ops.lora import LoraOptions, add_lora, merged
from moslim.reward import PreferenceClassifier
from moslim.reward.classifier_export import save_adapter, save_merged
from moslim.workbench.grammar import LEVELS

LORA = LoraOptions(rank=16, alpha=32.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
FORMS = ("shared", "classifier apart", "full", "four models")
WANTED = 0.4


def prepare(folder: Path, layers: int) -> int:
    """Saves the start, and a classifier on it in both forms; returns the bytes of the start's weights, in float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": layers}
    tokenizer = WorkbenchTokenizer().load()
    start = Architecture("llama", WorkbenchTokenizer(), sizes).build(tokenizer)
    start.save_pretrained(folder / "start")
    adapted = add_lora(PreferenceClassifier.from_backbone(start, PreferenceSet(LEVELS)), LORA, trained_whole=["head"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    save_adapter(adapted, str(folder / "start"), folder / "adapter")
    save_merged(merged(adapted), folder / "merged")
    for place in ("start", "adapter", "merged"):
        tokenizer.save_pretrained(folder / place)
    return sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder / "start").parameters())


def measure(form: str, folder: Path) -> dict[str, Any]:
    """Loads one form, in this process, and lets it take a step."""
    before = resident_bytes()
    module = PolicyTrainer(
        PreferenceSet(LEVELS),
        str(folder / "start"),
        str(folder / ("adapter" if form == "shared" else "merged")),
        ExpectedDistance(),
        PPO(),
        engine=TorchEngine(max_new_tokens=16),
        num_generations=2,
        lora=LORA if form in ("shared", "classifier apart") else None,
        share_backbone=form == "shared",
    )
    # As most implementations of PPO have it; the PolicyTrainer's own critic is a head on the policy's backbone.
    critic = AutoModel.from_pretrained(folder / "start", dtype=torch.float32) if form == "four models" else None
    held = parameters()
    weights = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in held}.values())
    for parameter in held:
        parameter.detach().sum()  # files are mapped into memory, and only what is read becomes resident
    found = {"weights": weights, "resident": resident_bytes() - before}
    return found if critic is not None else {**found, **one_step(module, folder / form)}


def parameters() -> list[torch.nn.Parameter]:
    """All parameters that this process holds, wherever."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]


def one_step(module: PolicyTrainer, folder: Path) -> dict[str, Any]:
    """Trains for a step; what the callback wrote, role by role."""
    data = PreferenceDataModule(module.preferences, Workbench(policy_rows=16), batch_size=4)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    plain = {"accelerator": "cpu", "use_distributed_sampler": False, "limit_val_batches": 0, "max_steps": 1}
    Trainer(default_root_dir=folder, callbacks=[RoleMemory()], **quiet, **plain).fit(module, data)
    with (folder / FILE).open(encoding="utf-8") as file:
        rows = {row.pop("role"): {name: int(value) for name, value in row.items()} for row in csv.DictReader(file)}
    return {"peak": max(row["peak"] for row in rows.values()), "roles": rows}


def in_process(form: str, folder: Path) -> dict[str, Any]:
    """Measures a form in a process of its own."""
    command = [sys.executable, __file__, "--form", form, "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Measures every form and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=9, help="of the model: 12.8 million parameters each")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_roles.json")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.form:
        print(json.dumps(measure(options.form, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(Path(folder), options.layers)
        forms = {form: in_process(form, Path(folder)) for form in FORMS}
    weights = {form: found["weights"] for form, found in forms.items()}
    result = {
        **circumstances(),
        "base_parameters": base // 4,
        "base_bytes": base,
        "copies": {form: round(size / base, 4) for form, size in weights.items()},
        "shared_to": {form: round(weights["shared"] / weights[form], 4) for form in FORMS[1:]},
        "wanted": f"shared to four models <= {WANTED}",
        "forms": forms,
    }
    write(options.out, result)
    print(f"copies of the base held: {result['copies']}; shared to the others: {result['shared_to']}")


if __name__ == "__main__":
    main()
