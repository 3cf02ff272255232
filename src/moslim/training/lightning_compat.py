"""Every use of a private or undocumented interface of Lightning, jsonargparse and W&B.

A release of these libraries may change them without notice. Each function or class names the interface and the version
with which it was tested; ``tests/training/test_lightning_compat.py`` fails if one changes. Uses of transformers, peft
and torch are in :mod:`moslim.ops.transformers_compat`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import yaml
from jsonargparse import _actions, _typehints
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM, _SignalConnector
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Returns the Trainer of a module; None if it has none, where ``module.trainer`` would raise an error.

    Uses ``LightningModule._trainer`` (Lightning 2.6).
    """
    return module._trainer


def finished_batches(trainer: Trainer) -> int:
    """Returns the number of the epoch's training batches that are processed, including their update.

    Uses ``fit_loop.epoch_loop.batch_progress.current.processed`` (Lightning 2.6, undocumented).
    """
    return int(_batches(trainer).processed)


def started_batches(trainer: Trainer) -> int:
    """Returns the number of the epoch's training batches that have started.

    Uses ``fit_loop.epoch_loop.batch_progress.current.ready`` (Lightning 2.6, undocumented).
    """
    return int(_batches(trainer).ready)


def finished_epochs(trainer: Trainer) -> int:
    """Returns the number of epochs whose batches are processed: the epoch that Lightning passes to samplers.

    ``trainer.current_epoch`` is smaller by 1 if the end of an epoch is restored. Uses
    ``fit_loop.epoch_progress.current.processed`` (Lightning 2.6, undocumented).
    """
    return int(_epochs(trainer).processed)


def started_epochs(trainer: Trainer) -> int:
    """Returns the number of epochs that have started, including the current one.

    Uses ``fit_loop.epoch_progress.current.ready`` (Lightning 2.6, undocumented).
    """
    return int(_epochs(trainer).ready)


def close_finished_epoch(trainer: Trainer) -> None:
    """Marks the last epoch of a resumed run as finished if all of its batches are processed.

    With ``max_steps``, Lightning treats such an epoch as unfinished: it trains one batch too many or, with validation,
    skips the order of one epoch.

    Uses ``_Loop.restarting.fset`` (Lightning 2.6), since the setter of ``_FitLoop`` ignores the value.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting and started_epochs(trainer) == finished_epochs(trainer):
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # mypy sees no property setter


def at_last_prediction(trainer: Trainer) -> bool:
    """Whether the current batch of ``predict`` is the last.

    Uses ``predict_loop.batch_progress.is_last_batch`` (Lightning 2.6, undocumented).
    """
    progress: Any = trainer.predict_loop.batch_progress
    return bool(progress.is_last_batch)


def keep_epoch_open(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Records an epoch that ``max_steps`` cut short as unfinished.

    Lightning records it as finished, so that a longer run that resumes would start the next epoch. The last step is
    recorded as incomplete; otherwise a resumed run would log all later steps with a number too high by 1 if a
    validation followed the step.

    Uses the entries of a checkpoint's ``loops`` (Lightning 2.6).

    Args:
        trainer: Trainer of the run.
        checkpoint: The checkpoint, changed in place; unchanged if it holds weights only.
    """
    if "loops" not in checkpoint:
        return
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    if 0 < batches["current"]["processed"] < trainer.num_training_batches and not batches["is_last_batch"]:
        if loop["epoch_progress"]["current"]["processed"] == loop["epoch_progress"]["current"]["ready"]:
            for counts in (batches["total"], batches["current"]):
                counts["completed"] -= 1
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        for counts in loop["epoch_progress"].values():
            counts["processed"] = counts["completed"] = counts["ready"] - 1


class DeferredSigterm(_SignalConnector):
    """Signal connector that records SIGTERM and forwards it to child processes; loops check it between batches.

    Lightning broadcasts within the signal handler, which may interrupt another collective of the same process and
    deadlock.

    Overrides ``_SignalConnector._sigterm_notifier_fn`` (Lightning 2.6).
    """

    def _sigterm_notifier_fn(self, signum: _SIGNUM, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if not self.received_sigterm and launcher is not None:
            launcher.kill(signum)
        self.received_sigterm = True


class CheckpointConnector(_CheckpointConnector):
    """Base of a Trainer's checkpoint connector, which reads and writes checkpoints; see :func:`install_connectors`.

    Derives from ``_CheckpointConnector``. A subclass can override ``resume_start``, ``restore_model`` and
    ``dump_checkpoint`` (Lightning 2.6).
    """

    @property
    def loading_path(self) -> str:
        """Path of the checkpoint that is being loaded: ``_CheckpointConnector._ckpt_path``."""
        return str(self._ckpt_path)


def install_connectors(trainer: Trainer, signals: DeferredSigterm, checkpoints: CheckpointConnector) -> None:
    """Replaces the connectors of a Trainer.

    Sets ``Trainer._signal_connector`` and ``Trainer._checkpoint_connector`` (Lightning 2.6).
    """
    trainer._signal_connector = signals
    trainer._checkpoint_connector = checkpoints


class OpenModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint with overridable decisions.

    Uses ``_should_skip_saving_checkpoint``, ``_should_save_on_exception``, ``_last_global_step_saved`` and
    ``_last_checkpoint_saved`` of ModelCheckpoint (Lightning 2.6).
    """

    def skips(self, trainer: Trainer) -> bool:
        """Whether to skip a checkpoint that is due."""
        return super()._should_skip_saving_checkpoint(trainer)

    def saves_on_exception(self, trainer: Trainer) -> bool:
        """Whether to write a checkpoint after an exception."""
        return super()._should_save_on_exception(trainer)

    def forget_older(self, trainer: Trainer) -> None:
        """Makes ``on_train_end`` write ``last.ckpt`` again, unless the current step is saved."""
        if self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return self.skips(trainer)

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        return self.saves_on_exception(trainer)


class OpenCLI(LightningCLI):
    """LightningCLI with overridable steps that ignores hyperparameters in checkpoints.

    Uses ``_get``, ``_dump_config``, ``_run_subcommand``, ``_prepare_subcommand_kwargs``, ``_instantiate_trainer``,
    ``_parse_ckpt_path``, ``_prepare_subcommand_parser`` and ``_subcommand_method_arguments`` of LightningCLI (Lightning
    2.6).
    """

    def may_run(self, subcommand: str) -> bool:
        """Whether to build the full parser of a subcommand."""
        return True

    def option(self, config: Any, key: str, default: Any = None) -> Any:
        """Returns the value of an option of the chosen command in ``self.config`` or ``self.config_init``."""
        return self._get(config, key, default)

    def fill_config_dump(self) -> None:
        """Sets ``self.config_dump``, the result of ``_dump_config``, to the whole config as plain data.

        Lightning would validate the config again, which takes as long as parsing it.
        """
        options: dict[str, Any] = {"skip_link_targets": False, "skip_none": False, "skip_validation": True}
        dump = yaml.safe_load(self.parser.dump(self.config, format="yaml", **options))
        self.config_dump = dump[self.config.subcommand]

    def run_subcommand(self, subcommand: str) -> None:
        """Runs the chosen command."""
        super()._run_subcommand(subcommand)

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        """Returns the arguments of the Trainer's method that runs the command."""
        return super()._prepare_subcommand_kwargs(subcommand)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Builds the Trainer from its options and the callbacks of the command line."""
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self.may_run(subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.subcommand_arguments(subcommand)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return self.build_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Does nothing, since Lightning would override the command line by the checkpoint's hyperparameters."""


def option_names(parser: LightningArgumentParser) -> list[str]:
    """Returns all options of a parser as written, such as ``--trainer.max_steps``.

    Uses ``argparse.ArgumentParser._actions`` (jsonargparse 4.53).
    """
    return [option for action in parser._actions for option in action.option_strings]


def set_option_type(parser: LightningArgumentParser, option: str, option_type: Any) -> None:
    """Sets the type of an option; the parser tries the members of a union in order.

    Sets ``_typehint`` of an entry of ``ArgumentParser._actions`` (jsonargparse 4.53).

    Args:
        parser: The parser.
        option: Name of the option, without the leading ``--``.
        option_type: The type.
    """
    actions: dict[str, Any] = {action.dest: action for action in parser._actions}
    actions[option]._typehint = option_type


def set_wandb_run(logger: WandbLogger, run_id: str) -> None:
    """Sets the run that a W&B logger resumes when it starts; it always starts with ``resume="allow"``.

    Sets ``WandbLogger._id`` and the entry ``id`` of ``WandbLogger._wandb_init`` (Lightning 2.6, W&B 0.31).
    """
    logger._id = logger._wandb_init["id"] = run_id


def _batches(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress.current


def _epochs(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_progress.current


def before_options(before: Callable[[Any, Any, Any, str], None]) -> None:
    """Registers a function to call before an option of the command line is merged into the config.

    Replaces ``__call__`` of ``_typehints.ActionTypeHint`` and ``_actions._ActionConfigLoad`` (jsonargparse 4.52, 4.53),
    once per process.

    Args:
        before: Function of the parser, the config so far, the value and the option as written.
    """
    for action in (_typehints.ActionTypeHint, _actions._ActionConfigLoad):
        apply = action.__call__
        if hasattr(apply, "applies"):
            continue

        def call(self: Any, *args: Any, _apply: Any = apply, **kwargs: Any) -> Any:
            if len(args) == 4:  # jsonargparse creates an action by a call without arguments
                before(*args)
            return _apply(self, *args, **kwargs)

        call.applies = apply  # type: ignore[attr-defined]
        action.__call__ = call  # type: ignore[method-assign]
