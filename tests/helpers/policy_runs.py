"""Whole runs of a tiny policy on the embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslim.algorithms.rloo import RLOO
from moslim.data.data_module import PreferenceDataModule
from moslim.data.samplers import Reachable
from moslim.data.sources.workbench import Workbench
from moslim.data.types import PromptBatch
from moslim.generation.torch_engine import TorchEngine
from moslim.mapping import ExpectedDistance
from moslim.ops.logprobs import ForwardConfig
from moslim.ops.lora import LoraOptions
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.policy.rollout import Rollout
from moslim.preferences import PreferenceSet
from moslim.training.trainer import MoslimTrainer

LIMIT, BATCH, SAMPLES = 8, 4, 3
PLAIN = ForwardConfig(share_prefixes="never", chunked_logprobs=False)
"""Every fast way switched off."""
LORA = LoraOptions(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])


class Traced(PolicyTrainer):
    """Remembers every training step; raises the exception ``stop`` in batch ``stop_at`` = (epoch, number)."""

    stop_at: tuple[int, int] | None = None
    stop: BaseException = KeyboardInterrupt()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trace: list[dict[str, Any]] = []
        self.parts: list[Rollout] = []

    def _minibatch(self, rollout: Rollout, step: int) -> Rollout:
        self.parts.append(super()._minibatch(rollout, step))
        return self.parts[-1]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == self.stop_at:
            raise self.stop
        before = self.rollout
        loss = super().training_step(batch, batch_idx)
        assert self.rollout is not None
        self.trace.append(
            {
                "key": self.rollout.key,
                "new": self.rollout is not before,
                "loss": loss.item(),
                "tokens": self.rollout.tokens.clone(),
                "advantages": self.rollout.advantages.clone(),
                "active": int((self.rollout.targets >= 0).sum()),
            }
        )
        return loss


def make(preferences: PreferenceSet, lm: str, classifier: str, kind: type[Traced] = Traced, **options: Any) -> Traced:
    """A policy that learns fast; ``options`` win."""
    rate = options.pop("rate", 1e-2)
    defaults: dict[str, Any] = {
        "mapping": ExpectedDistance(),
        "policy_optimizer": RLOO(kl_coef=0.05),
        "engine": TorchEngine(LIMIT),
        "num_generations": SAMPLES,
        "eval_num_generations": 2,
        "forward_config": ForwardConfig(tokens=80),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
    }
    torch.manual_seed(0)  # of an adapter's weights, which checkpoints hold
    return kind(preferences, lm, classifier, **{**defaults, **options})


def data(preferences: PreferenceSet, **options: Any) -> PreferenceDataModule:
    """Six batches an epoch; one question in validation and in the test."""
    defaults: dict[str, Any] = {"batch_size": BATCH, "validation_questions": 1, "test_questions": 1, "combinations": 1}
    defaults["sampler"] = Reachable([0.25, 0.5, 0.25])
    defaults["source"] = Workbench(policy_rows=6 * BATCH)
    return PreferenceDataModule(preferences, **{**defaults, **options})


def trainer(folder: Path, **options: Any) -> MoslimTrainer:
    """A quiet trainer that checks nothing but what it is told to."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "max_epochs": -1,
    }
    return MoslimTrainer(default_root_dir=folder, **{**quiet, **plain, **options})


def weights(module: PolicyTrainer) -> dict[str, Tensor]:
    """What is trained, as it is now."""
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}
