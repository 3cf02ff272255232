"""The policy's current weights in a folder that a server can read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

_KEPT = 2  # versions on disk: full weights of policy and reference take turns in a test


@dataclass(frozen=True)
class Version:
    """One state of the weights, saved.

    Args:
        name: A function of the weights: equal weights have equal names, in every process and run.
        folder: Where they lie, for the trainer.
        adapter: Whether they are an adapter's or the whole model's.
    """

    name: str
    folder: Path
    adapter: bool


class WeightFolder:
    """Saves what a model would answer with now, once per version, and forgets versions that are past.

    Args:
        folder: Where to save; several runs and processes may share it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._kept: list[Version] = []

    def save(self, model: Any) -> Version | None:
        """Saves the weights if they have changed.

        Args:
            model: A transformers model, or a peft model, of which the active adapter is saved.

        Returns:
            None where a peft model's adapter is switched off: the base is what the server started with.
        """
        if not hasattr(model, "peft_config"):
            return self._saved(model.state_dict(), False, model.save_pretrained)
        if _switched_off(model):
            return None
        from peft import get_peft_model_state_dict

        active = model.active_adapter
        own = {"adapter_name": active, "save_embedding_layers": False}
        scale = model.peft_config[active].lora_alpha
        state = {**get_peft_model_state_dict(model, **own), "alpha": torch.tensor(float(scale))}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
            if active != "default":  # peft puts it one folder deeper
                (folder / active).rename(folder.with_suffix(".inner"))
                shutil.rmtree(folder)
                folder.with_suffix(".inner").rename(folder)

        return self._saved(state, True, write)

    def forget(self) -> None:
        """Deletes all but the last versions; call it when no server needs older ones."""
        for version in self._kept[:-_KEPT]:
            shutil.rmtree(version.folder, ignore_errors=True)
        self._kept = self._kept[-_KEPT:]

    def _saved(self, state: dict[str, Tensor], adapter: bool, write: Callable[[Path], Any]) -> Version:
        name = f"moslim-{digest(state)}"
        version = Version(name, self.folder / name, adapter)
        self._kept = [*(kept for kept in self._kept if kept != version), version]
        if not version.folder.exists():
            part = self.folder / f".{name}-{uuid4().hex}"
            write(part)
            try:
                os.rename(part, version.folder)
            except OSError:  # another process was first
                shutil.rmtree(part)
        return version


def digest(state: dict[str, Tensor]) -> str:
    """Hash of every name, shape and bit, so that no change of the weights goes unnoticed."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _switched_off(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(layer, BaseTunerLayer) and layer.disable_adapters for layer in model.modules())
