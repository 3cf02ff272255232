"""Every use of a private or undocumented interface of Lightning, jsonargparse and W&B.

A release of these libraries may change them without notice. Each function or class names the interface and the version
that it was checked with; ``tests/training/test_lightning_compat.py`` names the interface that has changed. Those of
transformers, peft and torch are in :mod:`moslim.ops.transformers_compat`.
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
    """Returns the Trainer of a module; None where it has none, for which ``module.trainer`` raises an error.

    Uses ``LightningModule._trainer`` (Lightning 2.6).
    """
    return module._trainer


def finished_batches(trainer: Trainer) -> int:
    """Number of the epoch's training batches whose update is done.

    Uses ``fit_loop.epoch_loop.batch_progress.current.processed`` (Lightning 2.6), which no page documents.
    """
    return int(_batches(trainer).processed)


def started_batches(trainer: Trainer) -> int:
    """Number of the epoch's training batches that were begun.

    Uses ``fit_loop.epoch_loop.batch_progress.current.ready`` (Lightning 2.6), which no page documents.
    """
    return int(_batches(trainer).ready)


def finished_epochs(trainer: Trainer) -> int:
    """Number of epochs whose batches are done: the epoch that Lightning gives to samplers.

    ``trainer.current_epoch`` is behind it when the end of an epoch is restored. Uses
    ``fit_loop.epoch_progress.current.processed`` (Lightning 2.6), which no page documents.
    """
    return int(_epochs(trainer).processed)


def started_epochs(trainer: Trainer) -> int:
    """Number of epochs that were begun, the current one included, even if its end is not recorded yet.

    Uses ``fit_loop.epoch_progress.current.ready`` (Lightning 2.6), which no page documents.
    """
    return int(_epochs(trainer).ready)


def close_finished_epoch(trainer: Trainer) -> None:
    """Tells the fit loop of a resumed run that it does not continue an epoch whose batches are all done.

    With ``max_steps``, Lightning takes such an epoch for an unfinished one: it trains a batch too many or, with
    validation, continues with the order of the epoch after the next.

    Uses ``_Loop.restarting.fset`` (Lightning 2.6): the setter of ``_FitLoop`` would keep the value.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting and started_epochs(trainer) == finished_epochs(trainer):
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # mypy sees no property setter


def at_last_prediction(trainer: Trainer) -> bool:
    """Whether ``predict`` is at its last batch.

    Uses ``predict_loop.batch_progress.is_last_batch`` (Lightning 2.6), which no page documents.
    """
    progress: Any = trainer.predict_loop.batch_progress
    return bool(progress.is_last_batch)


def keep_epoch_open(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Records an epoch that the run's last step cut short as one still running.

    Lightning counts it as done, and a longer run resumed from there would start the next epoch. The last step itself
    is recorded as not yet counted: of one that is counted, and was followed by a validation, a resumed run logs all
    further steps a number too high.

    Uses the entries of a checkpoint's ``loops`` (Lightning 2.6).

    Args:
        trainer: The run's Trainer.
        checkpoint: The checkpoint, changed in place; one that holds weights only is left as it is.
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
    """Notes that SIGTERM came, and tells processes that this one started; the loops ask for it between batches.

    Lightning would broadcast from within the signal handler, possibly in the middle of another collective of the same
    process, and the processes would wait for each other for ever.

    Overrides ``_SignalConnector._sigterm_notifier_fn`` (Lightning 2.6).
    """

    def _sigterm_notifier_fn(self, signum: _SIGNUM, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if not self.received_sigterm and launcher is not None:
            launcher.kill(signum)
        self.received_sigterm = True


class CheckpointConnector(_CheckpointConnector):
    """Base of what loads and writes the checkpoints of a Trainer, to be put in by :func:`install_connectors`.

    Derives from ``_CheckpointConnector``, of which a subclass may override ``resume_start``, ``restore_model`` and
    ``dump_checkpoint`` (Lightning 2.6).
    """

    @property
    def loading_path(self) -> str:
        """Path of the checkpoint that is being loaded, from ``_CheckpointConnector._ckpt_path``."""
        return str(self._ckpt_path)


def install_connectors(trainer: Trainer, signals: DeferredSigterm, checkpoints: CheckpointConnector) -> None:
    """Puts connectors in the place of a Trainer's own.

    Sets ``Trainer._signal_connector`` and ``Trainer._checkpoint_connector`` (Lightning 2.6).
    """
    trainer._signal_connector = signals
    trainer._checkpoint_connector = checkpoints


class OpenModelCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose decisions a subclass can override.

    Uses ``_should_skip_saving_checkpoint``, ``_should_save_on_exception``, ``_last_global_step_saved`` and
    ``_last_checkpoint_saved`` of ModelCheckpoint (Lightning 2.6).
    """

    def skips(self, trainer: Trainer) -> bool:
        """Whether a checkpoint that is due is not written."""
        return super()._should_skip_saving_checkpoint(trainer)

    def saves_on_exception(self, trainer: Trainer) -> bool:
        """Whether an exception makes a checkpoint."""
        return super()._should_save_on_exception(trainer)

    def forget_older(self, trainer: Trainer) -> None:
        """Lets ``on_train_end`` write ``last.ckpt`` anew unless the current step is the one saved last."""
        if self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return self.skips(trainer)

    def _should_save_on_exception(self, trainer: Trainer) -> bool:
        return self.saves_on_exception(trainer)


class OpenCLI(LightningCLI):
    """A LightningCLI whose steps a subclass can override, and in which the command line beats a checkpoint.

    Uses ``_get``, ``_dump_config``, ``_run_subcommand``, ``_prepare_subcommand_kwargs``, ``_instantiate_trainer``,
    ``_parse_ckpt_path``, ``_prepare_subcommand_parser`` and ``_subcommand_method_arguments`` of LightningCLI (Lightning
    2.6).
    """

    def may_run(self, subcommand: str) -> bool:
        """Whether a subcommand gets a parser with all its options."""
        return True

    def option(self, config: Any, key: str, default: Any = None) -> Any:
        """Value of an option of the chosen command in ``self.config`` or ``self.config_init``."""
        return self._get(config, key, default)

    def fill_config_dump(self) -> None:
        """Sets ``self.config_dump``, from which ``_dump_config`` is done, to the whole config as plain data.

        Lightning would check the config anew, which takes as long as reading it.
        """
        options: dict[str, Any] = {"skip_link_targets": False, "skip_none": False, "skip_validation": True}
        dump = yaml.safe_load(self.parser.dump(self.config, format="yaml", **options))
        self.config_dump = dump[self.config.subcommand]

    def run_subcommand(self, subcommand: str) -> None:
        """Runs the chosen command."""
        super()._run_subcommand(subcommand)

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        """Arguments of the Trainer's method that is the command."""
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
        """Does nothing: Lightning would put a checkpoint's hyper-parameters over the command line."""


def option_names(parser: LightningArgumentParser) -> list[str]:
    """All options of a parser as they are written, such as ``--trainer.max_steps``.

    Uses ``argparse.ArgumentParser._actions``, which jsonargparse 4.53 keeps.
    """
    return [option for action in parser._actions for option in action.option_strings]


def set_option_type(parser: LightningArgumentParser, option: str, kinds: Any) -> None:
    """Sets the type that the values of an option must have; a parser tries the members of a union in their order.

    Sets ``_typehint`` of an entry of ``ArgumentParser._actions`` (jsonargparse 4.53).

    Args:
        parser: The parser.
        option: Name of the option, without the leading ``--``.
        kinds: The type.
    """
    actions: dict[str, Any] = {action.dest: action for action in parser._actions}
    actions[option]._typehint = kinds


def set_wandb_run(logger: WandbLogger, run_id: str) -> None:
    """Lets a W&B logger that has not started go on with a run; it always starts with ``resume="allow"``.

    Sets ``WandbLogger._id`` and the entry ``id`` of ``WandbLogger._wandb_init`` (Lightning 2.6, W&B 0.31).
    """
    logger._id = logger._wandb_init["id"] = run_id


def _batches(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress.current


def _epochs(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_progress.current


def before_options(before: Callable[[Any, Any, Any, str], None]) -> None:
    """Calls a function before an option of the command line is merged into what came before it.

    Replaces ``__call__`` of ``_typehints.ActionTypeHint`` and ``_actions._ActionConfigLoad`` (jsonargparse 4.52, 4.53),
    once in a process.

    Args:
        before: Takes the parser, the config so far, the value and the option as it is written.
    """
    for action in (_typehints.ActionTypeHint, _actions._ActionConfigLoad):
        apply = action.__call__
        if hasattr(apply, "applies"):
            continue

        def call(self: Any, *args: Any, _apply: Any = apply, **kwargs: Any) -> Any:
            if len(args) == 4:  # no arguments: jsonargparse makes an action of it
                before(*args)
            return _apply(self, *args, **kwargs)

        call.applies = apply  # type: ignore[attr-defined]
        action.__call__ = call  # type: ignore[method-assign]
