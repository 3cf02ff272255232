"""Finding the newest and the best checkpoint of a run, and restoring one where no Trainer loop does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from moslim.checkpoint_files import check_checkpoint, explained, fitting, newest_first, outline, problem
from moslim.errors import MissingFileError, UsageError

_OTHER_RUNS = ("guards", "checkpoints", "version_*")


def newest_checkpoint(
    folders: Iterable[str | Path],
    chosen: Iterable[str | Path] = (),
    weights_only: bool = True,
    resume: bool = False,
    asked: str = "last",
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
        asked: The value of ``--ckpt_path``, for messages.

    Raises:
        MissingFileError: There is none.
        UsageError: None of them is good.
    """
    places = {Path(root): list(_of_runs(Path(root))) for root in folders}
    for folder in map(Path, chosen):
        places[folder] = list(dict.fromkeys([*places.get(folder, []), *_saved(folder)]))
    by_root = sorted(
        filter(None, (newest_first(found, root) for root, found in places.items())),
        key=lambda found: max(started for started, _ in found),
        reverse=True,
    )
    if not by_root:
        raise MissingFileError(
            f"--ckpt_path {asked}: no checkpoint under {', '.join(map(str, places))}; run `fit` with the same "
            "--trainer.default_root_dir first, or name a file"
        )
    damaged: list[str] = []
    for path in dict.fromkeys(path for found in by_root for _, path in found):
        wrong = problem(path, weights_only, resume)
        if wrong is None:
            for message in damaged:
                rank_zero_warn(f"--ckpt_path {asked} leaves out {message}; it takes {path}")
            return path
        damaged.append(f"{path}: {wrong}")
    raise UsageError(f"--ckpt_path {asked}: there is no good checkpoint. {'; '.join(damaged)}")


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
    found = {state["best_model_path"]: state for state in kept if state["best_model_path"]}
    if not found:
        raise UsageError(
            f"--ckpt_path best: {newest} says of no best checkpoint: train with --checkpoint.monitor METRIC and "
            "--checkpoint.mode min or max, or give --ckpt_path last, or a file"
        )
    if len(found) > 1:
        several = ", ".join(f"{path} (by {state['monitor']})" for path, state in found.items())
        raise UsageError(f"--ckpt_path best: several metrics were monitored; name one of {several}")
    ((noted, state),) = found.items()
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
    own = model.configure_callbacks()
    for callback in [own] if isinstance(own, Callback) else own:
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
    """Where a file is now that a checkpoint names, if the folder of both was moved or copied; else where it was."""
    saved_in = Path(state.get("dirpath") or noted.parent)
    if noted.is_relative_to(saved_in):
        tail = noted.relative_to(saved_in)
    else:  # of the run that this one went on from
        runs = [i for i, name in enumerate(noted.parts) if name.startswith("version_")]
        tail = Path(*noted.parts[runs[-1] if runs else 0 :])
    beside = (folder / tail for folder in newest.parents)
    return next((path for path in (*beside, noted) if path.exists()), None)
