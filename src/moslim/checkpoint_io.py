"""Lightning's reading and writing of checkpoints: beside their place, and with everything wrong said by path."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from moslim.checkpoint_files import RUN, check_checkpoint, explained, fitting, is_remote
from moslim.training.lightning_compat import CheckpointConnector


class DirectIO(TorchCheckpointIO):
    """Writes a checkpoint straight to the given file, and to the disk.

    Lightning's own makes a copy in memory and another in the system's temporary folder, where a kill leaves it. The
    Trainer gives a name beside the checkpoint's, and moves the file when it is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a file; what is remote, Lightning writes."""
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class CheckedConnector(CheckpointConnector):
    """Checks a file before it is loaded, and writes into each which run it belongs to."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._started = time.time()

    def resume_start(self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None) -> None:
        """Loads a checkpoint.

        Raises:
            MissingFileError: There is none.
            UsageError: It is not whole, or something else.
        """
        if not checkpoint_path:
            super().resume_start(checkpoint_path, weights_only)
            return
        check_checkpoint(checkpoint_path, weights_only is not False, self.trainer.state.fn == TrainerFn.FITTING)
        with explained(checkpoint_path), fitting(checkpoint_path):
            super().resume_start(checkpoint_path, weights_only)

    def restore_model(self) -> None:
        """Gives the weights to the model.

        Raises:
            UsageError: They have no place in it.
        """
        with fitting(self.loading_path):
            super().restore_model()

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Adds to Lightning's checkpoint the run that writes it."""
        versions = [logger.version for logger in self.trainer.loggers if isinstance(logger, CSVLogger)]
        version = versions[0] if versions and isinstance(versions[0], int) else None
        return {**super().dump_checkpoint(weights_only), RUN: {"version": version, "started": self._started}}
