"""Trainer of the command line: Lightning's with the commands ``generate``, ``export`` and ``replay``."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from moslim.callbacks.dashboards import render
from moslim.callbacks.guards import Replay, ReplayedStep, StepTaken
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.training.checkpoint_files import is_remote
from moslim.training.checkpointing import CheckedConnector, DirectIO, restore
from moslim.training.distributed import any_process
from moslim.training.lightning_compat import DeferredSigterm, install_connectors
from moslim.utils.errors import UsageError


class MoslimTrainer(Trainer):
    """Lightning's Trainer with the commands ``generate``, ``export`` and ``replay``, and atomic writes of checkpoints.

    Args:
        args: As in Lightning's Trainer.
        kwargs: As in Lightning's Trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install_connectors(self, DeferredSigterm(self), CheckedConnector(self))
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = DirectIO()

    @property
    def received_sigterm(self) -> bool:
        """Whether any process received SIGTERM. Collective; the loops read it at the same places in all processes."""
        return any_process(super().received_sigterm, self.strategy.root_device)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint to a temporary path and renames it, so that a kill leaves the previous one intact."""
        is_async = isinstance(self.strategy.checkpoint_io, AsyncCheckpointIO)
        if is_async or is_remote(filepath):  # remote stores write atomically
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(self.strategy.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero and part.is_dir():  # left by a killed process
            shutil.rmtree(part)
        self.strategy.barrier()
        try:
            super().save_checkpoint(part, weights_only, storage_options)
        except BaseException:
            if part.is_file():  # incomplete, and as large as a checkpoint
                part.unlink()
            raise
        if self.is_global_zero:
            previous = path.with_name(f"{path.name}.before")
            if path.is_dir():  # of a sharding strategy; os.replace cannot replace a folder
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(path, previous)
            os.replace(part, path)
            shutil.rmtree(previous, ignore_errors=True)
        self.strategy.barrier()

    def generate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        question: str = "",
        levels: dict[str, int | str] | None = None,
        samples: int = 1,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> list[str]:
        """Prints a policy's completions of one question.

        Args:
            model: Module with a method ``answer(question, levels, samples)``.
            datamodule: Source of the instruction that writes the levels into the prompt.
            question: The question.
            levels: Requested level per dimension, as its name or index (0 = lowest), e.g. ``{warmth: warm}``; empty for
                a prompt without instruction.
            samples: Number of completions.
            ckpt_path: Checkpoint, or ``last``; ``none`` for the initial weights of the run. None after ``fit`` means
                the current weights.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Returns:
            The completions.

        Raises:
            UsageError: The module has no method ``answer``, the question is empty, or no checkpoint is named.
        """
        answer = _method(model, "answer")
        if not question.strip():
            raise UsageError("generate needs a question: --question 'How do I make tea?'")
        if ckpt_path is None and not self._trained_here(model) and not getattr(model, "starts_trained", False):
            raise UsageError(untrained("generate"))
        self._attach(model, datamodule, ckpt_path)
        answers: list[str] = answer(question, levels or {}, samples)
        print("\n\n".join(answers))
        return answers

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        out: str = "export",
        form: Literal["merged", "adapter"] = "merged",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes a trained model as a Hugging Face folder.

        Args:
            model: Module with a method ``export(folder)``, or ``export_adapter(folder)`` for ``form="adapter"``.
            datamodule: Source of the instruction, for modules that export it.
            out: Folder of the export.
            form: ``merged`` for a complete model, or ``adapter`` for the LoRA weights alone, which need the base model.
            ckpt_path: Checkpoint, or ``last``; ``none`` for the initial weights of the run. None is allowed after
                ``fit``, and if the module ``starts_trained``.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            UsageError: The module has no such method, or no checkpoint is named and the module starts untrained.
        """
        export = _method(model, "export" if form == "merged" else "export_adapter")
        is_trained = self._trained_here(model)
        if ckpt_path is None and not is_trained and not getattr(model, "starts_trained", False):
            raise UsageError(untrained("export"))
        self._attach(model, datamodule, ckpt_path)
        export(out)
        is_initial = not is_trained and not given(ckpt_path)
        note = ": the initial weights of the run, without further training (no --ckpt_path)" if is_initial else ""
        print(f"exported to {out}{note}")

    def replay(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> ReplayedStep:
        """Computes the next training step after a checkpoint up to its loss, and prints the completions with metrics.

        Neither trains nor writes files. With a file that a guard kept, it replays the step that tripped the guard.

        Args:
            model: Policy with the options of its training.
            datamodule: Data of the training.
            ckpt_path: File that a guard kept, or a checkpoint.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Returns:
            The step.

        Raises:
            UsageError: The module is no PolicyTrainer, no file is named, there are several processes, or training ends
                at the checkpoint.
        """
        if not isinstance(model, PolicyTrainer):
            raise UsageError(f"replay shows a step of a PolicyTrainer, not of a {type(model).__name__}")
        if ckpt_path is None:
            raise UsageError("replay needs a file that a guard kept: --ckpt_path .../guards/NAME.ckpt")
        if self.world_size > 1:
            raise UsageError("replay runs in one process: give --trainer.devices 1")
        model.accept_changes = [*model.accept_changes, "data.batch_size"]  # differs if several processes trained
        replay = Replay()
        replayed = [callback for callback in self.callbacks if getattr(callback, "replayed", False)]  # type: ignore[has-type]
        self.loggers, self.callbacks = [], [*replayed, replay]  # without those that write files
        with warnings.catch_warnings(), contextlib.suppress(StepTaken):
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if replay.step is None:
            raise UsageError(
                f"--ckpt_path {ckpt_path}: there is no step after it, as trainer.max_steps or max_epochs is reached: "
                "raise it, or name an earlier file"
            )
        _show(replay.step)
        return replay.step

    def _trained_here(self, model: LightningModule) -> bool:
        """Whether this Trainer has trained the module, as in a script that calls ``fit`` first."""
        return self.global_step > 0 and model is self.lightning_module

    def _attach(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str | None) -> None:
        """Connects module and data module as Lightning's loops do, and restores the checkpoint."""
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            self.datamodule, datamodule.trainer = datamodule, self
        model.configure_model()
        if ckpt_path is not None and given(ckpt_path):
            restore(self, model, ckpt_path)
        model.to(self.strategy.root_device).eval()


def given(ckpt_path: str | Path | None) -> bool:
    """Whether a checkpoint is named; ``none`` requests the initial weights."""
    return ckpt_path is not None and str(ckpt_path).lower() != "none"


def untrained(command: str) -> str:
    """Returns the error message of a command that would use the initial weights without being asked to."""
    return (
        f"{command} needs a trained model: give --ckpt_path last or a file, or --ckpt_path none for the initial "
        "weights of the run"
    )


def _show(step: ReplayedStep) -> None:
    """Prints the completions and the loss, with the loss that a guard recorded."""
    print(render(step.rows, "Completions of the step", ("reward", "advantage", "kl", "log_ratio", "tokens")))
    if step.record is None:
        print(f"loss {step.loss:.6g}")
    else:
        print(f"guard `{step.record['guard']}`: {step.record['reason']}")
        print(f"loss {step.loss:.6g}, noted when it tripped: {step.record['loss']:.6g}")


def _method(model: LightningModule, name: str) -> Any:
    """Returns a method of a module; raises a :class:`UsageError` if it has none of that name."""
    method = getattr(model, name, None)
    if not callable(method):
        raise UsageError(f"{type(model).__name__} has no method `{name}`: is this the config of another kind of model?")
    return method
