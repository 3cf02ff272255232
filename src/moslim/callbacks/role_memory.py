"""Which role of a policy's training holds how much memory."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.hooks import RemovableHandle

from moslim.loading import transformer_part
from moslim.peaks import PeakMemory
from moslim.policy.memory import Weights, describe, resident_weights
from moslim.policy.module import PolicyTrainer
from moslim.policy.roles import Role

FILE = "role_memory.csv"


class RoleMemory(Callback):
    """Writes ``role_memory.csv`` into the run's folder when a policy's ``fit`` starts, and logs its gist in a line.

    One line per role (policy, reference, classifier, critic): ``parameters`` that it reads, ``trained`` ones, bytes of
    weights that it would hold ``alone``, and those that it has ``added`` to the roles above it. After the first step
    the file also has the ``peak``: the most bytes in use, by all, from a pass of the role to the next one of another;
    backward pass and update count for the policy. On a CUDA device these are tensors on it, else the whole process;
    and ``memory/gpu_peak`` begins anew with each of them.

    The command line adds it to every run.
    """

    def __init__(self) -> None:
        self._weights: list[Weights] = []
        self._peaks: dict[Role, int | None] = {}
        self._handles: list[RemovableHandle] = []
        self._role: Role | None = None
        self._memory: PeakMemory | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the weights, and watches the first step."""
        if not isinstance(pl_module, PolicyTrainer):
            return
        self._weights, self._peaks, self._role = resident_weights(pl_module.roles, pl_module.scorer), {}, None
        self._memory = PeakMemory(pl_module.device)
        rank_zero_info(describe(self._weights))
        self._write(trainer, pl_module)
        self._watch(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the watch after the first step, and completes the file."""
        if self._handles and isinstance(pl_module, PolicyTrainer):
            self._begin(None)
            self._leave()
            self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the watch."""
        self._leave()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the watch, where there was no step."""
        self._leave()

    def _watch(self, module: PolicyTrainer) -> None:
        policy = transformer_part(module.roles.policy)
        self._on_pass(policy, lambda: module.roles.active)
        self._on_pass(module.scorer.classifier.backbone, lambda: "classifier")
        with module.roles.reference() as model:
            if transformer_part(model) is not policy:
                self._on_pass(transformer_part(model), lambda: "reference")

    def _on_pass(self, model: Any, role: Callable[[], Role]) -> None:
        def begin(passing: Any, *_: Any) -> None:
            if passing is model:  # and not a copy, which has its hooks, too: another thread may sample with one
                self._begin(role())

        self._handles.append(model.register_forward_pre_hook(begin))

    def _begin(self, role: Role | None) -> None:
        """Notes the peak of the role that made passes until now."""
        if self._memory is None or role == self._role:
            return
        if self._role is not None:
            self._peaks[self._role] = max(self._peaks.get(self._role) or 0, self._memory.read() or 0) or None
        self._memory.reset()
        self._role = role

    def _leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _write(self, trainer: Trainer, module: PolicyTrainer) -> None:
        path = module.run_folder / FILE
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(weights), "peak": self._peaks.get(weights.role)} for weights in self._weights]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
