"""What the modules keep in a checkpoint: trained weights and plain hyper-parameters, and a guard for the rest."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moslim.errors import UsageError
from moslim.identity import class_key
from moslim.sharding import whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_KEY = "frozen_fingerprint"
_SAMPLE = 4096


def keep_plain_hparams(module: LightningModule) -> None:
    """Drops objects from saved hyper-parameters; a checkpoint that holds them does not load with ``weights_only``.

    Call it after ``save_hyperparameters()``. Under the command line they are plain already.
    """
    for name in [name for name, value in module.hparams.items() if not _plain(value)]:
        del module.hparams[name]


def drop_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Takes frozen parameters out of a checkpoint and leaves a fingerprint of them there."""
    frozen = _frozen(module)
    if frozen:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[_KEY] = fingerprint(frozen)


def restore_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Puts the module's own frozen parameters into a checkpoint, which then loads strictly.

    Raises:
        UsageError: They are not those that the checkpoint was trained with.
    """
    frozen = _frozen(module)
    if checkpoint.get(_KEY, fingerprint(frozen)) != fingerprint(frozen):
        raise UsageError(
            "the checkpoint was trained on other frozen weights than those loaded now: "
            "give the same backbone and the same set of trained parameters"
        )
    if "state_dict" in checkpoint:  # else the strategy has loaded the weights itself
        checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}


def plain_options(part: object) -> dict[str, Any]:
    """Class and public attributes of an object, as far as they are plain data or objects that hold such."""
    found: dict[str, Any] = {"class": class_key(type(part))}
    for name, value in vars(part).items():
        if not name.startswith("_"):
            if _plain(value):
                found[name] = value
            elif dataclasses.is_dataclass(value):
                found[name] = plain_options(value)
    return found


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and evenly spaced values, at bfloat16, so that a change of precision goes unnoticed.

    Where tensors are in shards, every process must ask.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = whole(tensor.detach()).flatten()
        sample = values[:: max(1, len(values) // _SAMPLE)].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if not p.requires_grad}


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
