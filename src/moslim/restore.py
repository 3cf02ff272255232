"""Finding the newest checkpoint of a run, and restoring one where no Trainer loop does it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moslim.errors import MissingFileError

_PLACES = ("*.ckpt", "checkpoints/*.ckpt", "version_*/checkpoints/*.ckpt")


def newest_checkpoint(folders: Iterable[str | Path]) -> Path:
    """Returns the checkpoint written last in the given run folders.

    Args:
        folders: Roots of runs. Looked at in each: the folder itself, its ``checkpoints``, and the ``checkpoints`` of
            every ``version_N``, so that a second process finds what the first one left.

    Raises:
        MissingFileError: There is none.
    """
    roots = list(dict.fromkeys(Path(folder) for folder in folders))
    found = [path for root in roots for place in _PLACES for path in root.glob(place)]
    if not found:
        raise MissingFileError(
            f"--ckpt_path last: no checkpoint under {', '.join(map(str, roots))}; run `fit` with the same "
            "--trainer.default_root_dir first, or name a file"
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def restore(trainer: Trainer, model: LightningModule, path: str | Path) -> None:
    """Loads weights and the state of the module's own callbacks, as ``fit`` and ``test`` do.

    ``load_from_checkpoint`` would leave out the callbacks, and with them the statistics of mapping functions.

    Args:
        trainer: Its strategy is connected to the module.
        model: The module; its ``configure_callbacks`` says which callbacks are its own.
        path: The checkpoint; only tensors and plain data are read from it.

    Raises:
        MissingFileError: There is no such file.
    """
    if not Path(path).exists():
        raise MissingFileError(f"--ckpt_path {path}: there is no such checkpoint")
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    own = model.configure_callbacks()
    for callback in [own] if isinstance(own, Callback) else own:
        callback.on_load_checkpoint(trainer, model, checkpoint)
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is not None:
            callback.load_state_dict(state)
