"""A policy, a classifier and a config small enough to train in a second, for benchmarks of what a run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moslim import PreferenceSet
from moslim.ops import Architecture, WorkbenchTokenizer
from moslim.reward import PreferenceClassifier
from moslim.workbench.grammar import LEVELS

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {
        **{"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2},
        **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    },
}
"""By architecture. In float64, GPT-2 computes in it throughout; of Llama, transformers computes norms in float32."""

_ADAPTIVE = {"class_path": "moslim.algorithms.AdaptiveKL", "init_args": {"target": 0.01}}
_PACKAGE = "moslim.algorithms"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "RLOO": {"kl_coef": 0.1, "kl_controller": _ADAPTIVE},
    "ReinforcePlusPlus": {"kl_coef": 0.1, "kl_controller": _ADAPTIVE},
    "GRPO": {"kl_coef": 0.1, "kl_controller": _ADAPTIVE},
    "PPO": {"kl_coef": 0.1, "kl_controller": _ADAPTIVE},
    "OnlineDPO": {"beta": 0.1},
}
"""Name and options of every policy optimizer; where it can have a KL controller, it has one."""


def save_models(folder: Path, kind: str = "llama") -> None:
    """Writes ``lm`` and ``classifier`` with random weights; the latter has clear-cut opinions."""
    tokenizer = WorkbenchTokenizer().load()
    torch.manual_seed(0)
    sizes = {**SIZES[kind], "initializer_range": 0.3}
    language_model = Architecture(kind, WorkbenchTokenizer(), sizes).build(tokenizer)
    classifier = PreferenceClassifier.from_backbone(language_model, PreferenceSet(LEVELS))
    torch.nn.init.normal_(classifier.head.weight, std=0.5)
    for model, name in ((language_model, "lm"), (classifier, "classifier")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def policy_config(models: Path, name: str, batch_size: int, **model: Any) -> dict[str, Any]:
    """A run in which everything has a state: mapping, sampler, KL controller, momentum, critic.

    Args:
        models: Where :func:`save_models` wrote.
        name: Of a policy optimizer.
        batch_size: Prompts per process and rollout.
        model: More options of ``PolicyTrainer``; they win.
    """
    options = {
        "model": str(models / "lm"),
        "classifier": str(models / "classifier"),
        "mapping": {
            "class_path": "moslim.mapping.TargetProbability",
            "init_args": {"scope": "running", "min_count": 6},
        },
        "policy_optimizer": {"class_path": f"{_PACKAGE}.{name}", "init_args": OPTIMIZERS[name]},
        "engine": {"class_path": "moslim.generation.TorchEngine", "init_args": {"max_new_tokens": 8}},
        "num_generations": 3,
        "default_kl_coef": 0.1,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.0}},
    }
    return {
        "preferences": {"dimensions": {name: list(LEVELS[name]) for name in ("warmth", "verbosity")}},
        "model": {"class_path": "moslim.PolicyTrainer", "init_args": {**options, **model}},
        "data": {
            "class_path": "moslim.PreferenceDataModule",
            "init_args": {
                "source": {"class_path": "moslim.data.Workbench", "init_args": {"policy_rows": 48}},
                "sampler": {
                    "class_path": "moslim.data.ErrorWeighted",
                    "init_args": {"active": [0.25, 0.5, 0.25]},
                },
                "batch_size": batch_size,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
