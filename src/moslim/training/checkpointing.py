"""Writing, reading and finding checkpoints.

Errors name the file. Modules save trained weights, plain
hyper-parameters and a fingerprint of frozen weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from moslim.training.checkpoint_files import (
    RUN,
    check_checkpoint,
    explained,
    fitting,
    is_remote,
    newest_first,
    outline,
    problem,
)
from moslim.training.distributed import whole
from moslim.training.identity import class_key
from moslim.training.lightning_compat import CheckpointConnector
from moslim.utils.errors import MissingFileError, UsageError


class DirectIO(TorchCheckpointIO):
    """Checkpoint IO that writes directly to the given file and syncs it to disk.

    Lightning's makes a copy in memory and another in the system's temporary folder, where a kill leaves it.
    :class:`~moslim.training.MoslimTrainer` passes a temporary name and renames the complete file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a local file; remote paths are left to Lightning."""
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class CheckedConnector(CheckpointConnector):
    """Checkpoint connector that checks files before loading, and records the run in each checkpoint."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._started = time.time()

    def resume_start(self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None) -> None:
        """Checks and loads a checkpoint.

        Raises:
            MissingFileError: The checkpoint does not exist.
            UsageError: It is damaged, or no checkpoint.
        """
        if not checkpoint_path:
            super().resume_start(checkpoint_path, weights_only)
            return
        check_checkpoint(checkpoint_path, weights_only is not False, self.trainer.state.fn == TrainerFn.FITTING)
        with explained(checkpoint_path), fitting(checkpoint_path):
            super().resume_start(checkpoint_path, weights_only)

    def restore_model(self) -> None:
        """Loads the weights into the model.

        Raises:
            UsageError: Their names or shapes differ from those of the model.
        """
        with fitting(self.loading_path):
            super().restore_model()

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Returns Lightning's checkpoint with an entry about the run that writes it."""
        versions = [logger.version for logger in self.trainer.loggers if isinstance(logger, CSVLogger)]
        version = versions[0] if versions and isinstance(versions[0], int) else None
        return {**super().dump_checkpoint(weights_only), RUN: {"version": version, "started": self._started}}


_KEY = "frozen_fingerprint"
_SAMPLE = 4096


def keep_plain_hparams(module: LightningModule) -> None:
    """Removes objects from saved hyperparameters, since ``weights_only`` loading refuses them.

    Call it after ``save_hyperparameters()``. From the command line, hyperparameters are plain data.
    """
    for name in [name for name, value in module.hparams.items() if not _plain(value)]:
        del module.hparams[name]


def drop_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Replaces the frozen parameters in a checkpoint by their fingerprint."""
    frozen = _frozen(module)
    if frozen:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[_KEY] = fingerprint(frozen)


def restore_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Adds the module's frozen parameters to a checkpoint, so that it loads strictly.

    Raises:
        UsageError: Their fingerprint differs from that in the checkpoint.
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
    options: dict[str, Any] = {"class": class_key(type(part))}
    for name, value in vars(part).items():
        if not name.startswith("_"):
            if _plain(value):
                options[name] = value
            elif dataclasses.is_dataclass(value):
                options[name] = plain_options(value)
    return options


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and evenly spaced values, at bfloat16, so that a change of precision goes unnoticed.

    Collective if tensors are sharded.
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


_OTHER_RUNS = ("guards", "checkpoints", "version_*")


def newest_checkpoint(
    folders: Iterable[str | Path],
    chosen: Iterable[str | Path] = (),
    weights_only: bool = True,
    resume: bool = False,
    requested: str = "last",
) -> Path:
    """Returns the last good checkpoint of the newest run; damaged ones are left out with a warning.

    The newest run is that of the highest ``version_N``; its last checkpoint is that of the highest global step. File
    times, which a copy changes, do not count. What a guard kept is left out.

    Args:
        folders: Roots of runs. Looked at in each: the folder itself, its ``checkpoints``, and the ``checkpoints`` of
            every ``version_N``, so that a second process finds what the first one left.
        chosen: Folders that hold checkpoints, of one run or of several.
        weights_only: Whether checkpoints must hold tensors and plain data only.
        resume: Whether training goes on from it, so that it must hold more than weights.
        requested: The value of ``--ckpt_path``, for messages.

    Raises:
        MissingFileError: There is none.
        UsageError: None of them is good.
    """
    places = {Path(root): list(_of_runs(Path(root))) for root in folders}
    for folder in map(Path, chosen):
        places[folder] = list(dict.fromkeys([*places.get(folder, []), *_saved(folder)]))
    by_root = sorted(
        filter(None, (newest_first(files, root) for root, files in places.items())),
        key=lambda files: max(started for started, _ in files),
        reverse=True,
    )
    if not by_root:
        raise MissingFileError(
            f"--ckpt_path {requested}: no checkpoint under {', '.join(map(str, places))}; run `fit` with the same "
            "--trainer.default_root_dir first, or name a file"
        )
    damaged: list[str] = []
    for path in dict.fromkeys(path for files in by_root for _, path in files):
        wrong = problem(path, weights_only, resume)
        if wrong is None:
            for message in damaged:
                rank_zero_warn(f"--ckpt_path {requested} leaves out {message}; it takes {path}")
            return path
        damaged.append(f"{path}: {wrong}")
    raise UsageError(f"--ckpt_path {requested}: there is no good checkpoint. {'; '.join(damaged)}")


def best_checkpoint_of(newest: Path) -> Path:
    """Returns the checkpoint that the run of a given one noted as its best, wherever the run's folder is now.

    Args:
        newest: The last checkpoint of the run.

    Raises:
        UsageError: Nothing was monitored, several things were, or the file is gone.
    """
    states = outline(newest).get("callbacks", {}).values()
    kept = [
        state for state in states if isinstance(state, dict) and state.get("monitor") and "best_model_path" in state
    ]
    best = {state["best_model_path"]: state for state in kept if state["best_model_path"]}
    if not best:
        raise UsageError(
            f"--ckpt_path best: {newest} says of no best checkpoint: train with --checkpoint.monitor METRIC and "
            "--checkpoint.mode min or max, or give --ckpt_path last, or a file"
        )
    if len(best) > 1:
        several = ", ".join(f"{path} (by {state['monitor']})" for path, state in best.items())
        raise UsageError(f"--ckpt_path best: several metrics were monitored; name one of {several}")
    ((noted, state),) = best.items()
    path = _moved(Path(noted), state, newest)
    if path is None:
        raise UsageError(
            f"--ckpt_path best: {noted}, the best by {state['monitor']} as {newest} says, is neither there nor beside "
            "it: name a file, or give --ckpt_path last"
        )
    rank_zero_info(f"--ckpt_path best: {path}, the best by {state['monitor']} of the run of {newest}")
    return path


def restore(trainer: Trainer, model: LightningModule, path: str | Path) -> None:
    """Loads weights and the state of the module's own callbacks, as ``fit`` and ``test`` do.

    ``load_from_checkpoint`` would leave out the callbacks, and with them the statistics of mapping functions.

    Args:
        trainer: Its strategy is connected to the module.
        model: The module; its ``configure_callbacks`` says which callbacks are its own.
        path: The checkpoint; only tensors and plain data are read from it.

    Raises:
        MissingFileError: There is no such file.
        UsageError: It is not whole, or not of this module.
    """
    check_checkpoint(path)
    with explained(path):
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.ckpt_path = path
    model.on_load_checkpoint(checkpoint)
    with fitting(path):
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    callbacks = model.configure_callbacks()
    for callback in [callbacks] if isinstance(callbacks, Callback) else callbacks:
        callback.on_load_checkpoint(trainer, model, checkpoint)
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is not None:
            callback.load_state_dict(state)


def _of_runs(root: Path) -> Iterator[Path]:
    yield from root.glob("*.ckpt")
    for folder in (root / "checkpoints", *root.glob("version_*/checkpoints")):
        yield from _saved(folder)


def _saved(folder: Path) -> Iterator[Path]:
    """Checkpoints in a folder, and in folders that names with ``/`` make there; not those of a run of its own."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix == ".ckpt":
            yield path
        elif path.name.endswith(".ckpt.before") and not path.with_suffix("").exists():
            yield path  # a folder that a kill kept from being replaced
        elif path.is_symlink():  # which may lead back here
            continue
        elif path.is_dir() and not any(map(path.match, (*_OTHER_RUNS, "*.ckpt.*"))):
            yield from _saved(path)


def _moved(noted: Path, state: dict[str, Any], newest: Path) -> Path | None:
    """Returns the current place of a file that a checkpoint names, also if their folder was moved or copied."""
    saved_in = Path(state.get("dirpath") or noted.parent)
    if noted.is_relative_to(saved_in):
        tail = noted.relative_to(saved_in)
    else:  # of the run that this one went on from
        runs = [i for i, name in enumerate(noted.parts) if name.startswith("version_")]
        tail = Path(*noted.parts[runs[-1] if runs else 0 :])
    beside = (folder / tail for folder in newest.parents)
    return next((path for path in (*beside, noted) if path.exists()), None)
