"""The Trainer of the command line: Lightning's, with the commands ``generate``, ``export`` and ``replay``."""

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
    """Lightning's Trainer with three more commands, and checkpoints that are whole or not there.

    Args:
        args: Lightning's.
        kwargs: Lightning's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install_connectors(self, DeferredSigterm(self), CheckedConnector(self))
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = DirectIO()

    @property
    def received_sigterm(self) -> bool:
        """Whether one of the processes received SIGTERM; the loops ask in all of them at the same places."""
        return any_process(super().received_sigterm, self.strategy.root_device)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint beside its place and moves it there, so that a kill leaves the one before it."""
        writes_later = isinstance(self.strategy.checkpoint_io, AsyncCheckpointIO)
        if writes_later or is_remote(filepath):  # a remote store's own writing is atomic
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(self.strategy.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero and part.is_dir():  # of a process that was killed
            shutil.rmtree(part)
        self.strategy.barrier()
        try:
            super().save_checkpoint(part, weights_only, storage_options)
        except BaseException:
            if part.is_file():  # as large as a checkpoint, and of no use
                part.unlink()
            raise
        if self.is_global_zero:
            before = path.with_name(f"{path.name}.before")
            if path.is_dir():  # of a strategy whose checkpoints are folders, which nothing can replace at once
                shutil.rmtree(before, ignore_errors=True)
                os.replace(path, before)
            os.replace(part, path)
            shutil.rmtree(before, ignore_errors=True)
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
        """Prints a policy's answers to one question.

        Args:
            model: A module with ``answer(question, levels, samples)``.
            datamodule: Source of the instruction that puts the levels into the prompt.
            question: The question.
            levels: Wanted level by dimension name, by its name or its number (0 = lowest), e.g. ``{warmth: warm}``;
                none for an ordinary answer.
            samples: Number of answers.
            ckpt_path: Checkpoint, or ``last``; ``none`` for answers of what the run starts from. None after ``fit``: of
                the weights as they are.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            UsageError: The module cannot answer.
            UsageError: There is no question, or no checkpoint is named.
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
            model: A module with ``export(folder)``, or ``export_adapter(folder)`` for that form.
            datamodule: Source of the instruction, for modules that export it.
            out: The folder to write.
            form: ``merged``, a model that needs nothing else; or ``adapter``, which of a model trained with LoRA holds
                what training changed, and needs the base model.
            ckpt_path: Checkpoint, or ``last``; ``none`` for what the run starts from, which is also exported without a
                checkpoint if the module says that it ``starts_trained``, or after ``fit``.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            UsageError: The module cannot be exported.
            UsageError: No checkpoint is named, and the module starts untrained.
        """
        export = _method(model, "export" if form == "merged" else "export_adapter")
        trained = self._trained_here(model)
        if ckpt_path is None and not trained and not getattr(model, "starts_trained", False):
            raise UsageError(untrained("export"))
        self._attach(model, datamodule, ckpt_path)
        export(out)
        is_start = not trained and not given(ckpt_path)
        start = ": what the run starts from, not trained any further (no --ckpt_path)" if is_start else ""
        print(f"exported to {out}{start}")

    def replay(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> ReplayedStep:
        """Takes a policy's next step again, up to its loss, and prints its answers with their figures.

        Nothing is trained and nothing written. With a file that a guard kept, it is the step at which it tripped.

        Args:
            model: The policy, with the options that it was trained with.
            datamodule: Its data.
            ckpt_path: File that a guard kept, or a checkpoint.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            UsageError: The module is no PolicyTrainer.
            UsageError: No file is named, there are several processes, or training was over.
        """
        if not isinstance(model, PolicyTrainer):
            raise UsageError(f"replay shows a step of a PolicyTrainer, not of a {type(model).__name__}")
        if ckpt_path is None:
            raise UsageError("replay needs a file that a guard kept: --ckpt_path .../guards/NAME.ckpt")
        if self.world_size > 1:
            raise UsageError("replay takes one process: --trainer.devices 1")
        model.accept_changes = [*model.accept_changes, "data.batch_size"]  # that of several processes
        replay = Replay()
        kept = [callback for callback in self.callbacks if getattr(callback, "replayed", False)]  # type: ignore[has-type]
        self.loggers, self.callbacks = [], [*kept, replay]  # what writes is left out
        with warnings.catch_warnings(), contextlib.suppress(StepTaken):
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if replay.step is None:
            raise UsageError(
                f"--ckpt_path {ckpt_path}: there is no step after it, trainer.max_steps or max_epochs is reached"
            )
        _show(replay.step)
        return replay.step

    def _trained_here(self, model: LightningModule) -> bool:
        """Whether this Trainer has trained the module, as a script does that goes on without a checkpoint."""
        return self.global_step > 0 and model is self.lightning_module

    def _attach(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str | None) -> None:
        """Connects module and data as a loop would, and restores the checkpoint."""
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            self.datamodule, datamodule.trainer = datamodule, self
        model.configure_model()
        if ckpt_path is not None and given(ckpt_path):
            restore(self, model, ckpt_path)
        model.to(self.strategy.root_device).eval()


def given(ckpt_path: str | Path | None) -> bool:
    """Whether a checkpoint is named; ``none`` means on purpose that there is none."""
    return ckpt_path is not None and str(ckpt_path).lower() != "none"


def untrained(command: str) -> str:
    """Message for a command that would silently use weights as they are before training."""
    return (
        f"{command} needs a trained model: --ckpt_path last, or a file; --ckpt_path none takes the weights that the "
        "run starts from"
    )


def _show(step: ReplayedStep) -> None:
    """Prints the answers, and the loss beside the one that a guard noted."""
    print(render(step.rows, "The step's answers", ("reward", "advantage", "kl", "log_ratio", "tokens")))
    if step.record is None:
        print(f"loss {step.loss:.6g}")
    else:
        print(f"guard `{step.record['guard']}`: {step.record['reason']}")
        print(f"loss {step.loss:.6g}, noted when it tripped: {step.record['loss']:.6g}")


def _method(model: LightningModule, name: str) -> Any:
    method = getattr(model, name, None)
    if not callable(method):
        raise UsageError(f"{type(model).__name__} has no method `{name}`: is this the config of another kind of model?")
    return method
