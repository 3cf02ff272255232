"""Every use of a private or undocumented interface of Lightning, jsonargparse, W&B, transformers, peft and torch.

A release of these libraries may change them without notice. Each function or class names the interface and the version
that it was checked with; the tests of this module name the interface that has changed.

Some names are undocumented, too, but used as they are: the tables of class names by ``model_type`` in
``transformers.models.auto.modeling_auto`` and the attention function ``sdpa_attention_forward`` (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from jsonargparse import _actions, _typehints
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM, _SignalConnector
from torch import Tensor, nn
from transformers import PreTrainedConfig
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
from transformers.utils import cached_file


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

    Uses ``_get``, ``_dump_config``, ``_run_subcommand``, ``_prepare_subcommand_kwargs``, ``_instantiate_trainer`` and
    ``_parse_ckpt_path`` of LightningCLI (Lightning 2.6).
    """

    def option(self, config: Any, key: str, default: Any = None) -> Any:
        """Value of an option of the chosen command in ``self.config`` or ``self.config_init``."""
        return self._get(config, key, default)

    def fill_config_dump(self) -> None:
        """Sets ``self.config_dump`` to the whole config as plain data."""
        self._dump_config()

    def run_subcommand(self, subcommand: str) -> None:
        """Runs the chosen command."""
        super()._run_subcommand(subcommand)

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        """Arguments of the Trainer's method that is the command."""
        return super()._prepare_subcommand_kwargs(subcommand)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Builds the Trainer from its options and the callbacks of the command line."""
        return super()._instantiate_trainer(config, callbacks)

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


_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a model uses, such as ``sdpa``.

    Reads ``PreTrainedConfig._attn_implementation`` (transformers 5.23).
    """
    return config._attn_implementation


@contextmanager
def attention_replaced(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Lets a model use another registered attention.

    Sets ``PreTrainedConfig._attn_implementation`` (transformers 5.23), which a model reads in every forward pass; its
    ``set_attn_implementation`` would check and load kernels each time.

    Args:
        config: Configuration of the part that reads text.
        name: Name in ``AttentionInterface``.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def is_stateful(model: nn.Module) -> bool:
    """Whether a model says that it carries a state from token to token.

    Reads ``PreTrainedModel._is_stateful`` (transformers 5.23).
    """
    return bool(getattr(model, "_is_stateful", False))


def block_kinds(model: nn.Module) -> frozenset[str] | None:
    """Class names of a transformer's blocks; empty if it does not name them, None for another kind of module.

    Reads ``PreTrainedModel._no_split_modules`` (transformers 5.23).
    """
    if not hasattr(model, "_no_split_modules"):
        return None
    return frozenset(model._no_split_modules or ())  # type: ignore[arg-type]


def found_file(folder: str, name: str) -> str | None:
    """Path of a file in a folder or a repository of the Hub; None where there is none.

    Passes ``_raise_exceptions_for_missing_entries`` to ``cached_file`` (transformers 5.23).
    """
    path: str | None = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return path


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a configuration, without those that depend on where and how it was saved.

    Leaves out ``_name_or_path`` (transformers 5.23), among others.
    """
    return {name: value for name, value in config.to_dict().items() if name not in _ABOUT_FILES}


def apply_liger(model: nn.Module) -> None:
    """Puts Liger's fused kernels into a model, without those of the loss.

    Calls ``transformers.integrations.liger.apply_liger_kernel`` (transformers 5.23), which ``Trainer`` uses.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def lora_targets(model_type: str) -> list[str] | str | None:
    """Layers that peft adapts by default in an architecture; None where it knows none.

    Reads ``peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`` (peft 0.21).
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known: Any = KNOWN.get(model_type)
    return known if known is None or isinstance(known, str) else [str(name) for name in known]


def matching_pattern(patterns: Any, name: str) -> str:
    """The first of peft's patterns (of ``rank_pattern``, say) that a module's name fits; the name where none fits.

    Calls ``peft.utils.other.get_pattern_key`` (peft 0.21).
    """
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(patterns, name))


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward pass.

    Reads ``Module._forward_hooks`` and ``Module._forward_pre_hooks`` (torch 2.13).
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_pack_linear() -> bool:
    """Whether torch has oneDNN's packed product, which :func:`packed_linear` makes.

    Asks for ``torch.ops.mkldnn._linear_pointwise`` and ``_reorder_linear_weight`` (torch 2.13).
    """
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def packed_linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A product with a copy of a float32 matrix in oneDNN's packed order, as Inductor's frozen models make it.

    Calls ``torch.ops.mkldnn._reorder_linear_weight`` and ``_linear_pointwise`` (torch 2.13).

    Args:
        weight: ``[V, H]``, on a CPU.
        rows: Number of rows to pack for; others work, too.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")
        return product

    return forward
