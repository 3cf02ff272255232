"""Command line: a LightningCLI that links preferences and seed to model and data and validates its options."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import netrc
import os
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers.utils import logging as transformers_logging

from moslim.callbacks.dashboards import Dashboard, continue_run
from moslim.callbacks.monitors import RoleMemory, StepCheckpoint, ThroughputMonitor
from moslim.data.data_module import PreferenceDataModule
from moslim.policy.policy_export import generate
from moslim.preferences import PreferenceSet
from moslim.training.base_module import RunModule
from moslim.training.checkpoint_files import is_remote
from moslim.training.checkpointing import best_checkpoint_of, newest_checkpoint
from moslim.training.command_errors import NewFolders, debugging, in_own_code, reported, shortened, without_flag
from moslim.training.config_files import (
    MoslimParser,
    dropped,
    install,
    is_shipped,
    layered,
    located,
    missing,
    refuse_dangerous_names,
)
from moslim.training.lightning_compat import OpenCLI, set_option_type
from moslim.training.trainer import MoslimTrainer, given, untrained
from moslim.training.trust import check_configs, imports_from_here, with_defaults
from moslim.utils.errors import UsageError
from moslim.utils.files import metrics_table

_LOGGERS = tuple(
    f"{package}.{name}"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    for name in ("utilities.rank_zero", "utilities.seed", "accelerators.cuda", "trainer.connectors.signal_connector")
)
_HIDDEN_MESSAGES = re.compile(
    r"💡 Tip|Seed set to |GPU available: False|[TH]PU available|LOCAL_RANK: |Restoring states from the checkpoint path"
    r"|`Trainer\(\w+=.*\)` was configured so|Using \w+( \w+)? Automatic Mixed Precision"
    r"|The following callbacks returned in `LightningModule.configure_callbacks` will override"
)
_HIDDEN_WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # the reference and the classifier stay in eval mode
    r".*does not have many workers",
    r".*LeafSpec.*is deprecated",
    r"The dirpath has changed from",  # each run has its own folder
    r"You have overridden `\w+` in `LightningModule` but have passed in a `LightningDataModule`",
    r"[\s\S]*JsonargparseDeprecationWarning",
    r"[\s\S]*deprecated in v4\.",
)


class _MessageFilter(logging.Filter):
    """Drops the log messages that match :data:`_HIDDEN_MESSAGES`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is shown."""
        return not _HIDDEN_MESSAGES.match(record.getMessage().strip())


_MESSAGE_FILTER = _MessageFilter()


def hide_library_messages() -> None:
    """Hides irrelevant tips and warnings of other libraries. Repeated calls have no further effect."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_MESSAGE_FILTER)
    for pattern in _HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def one_line_warnings() -> None:
    """Formats warnings as one line, without file and line number."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


_TRAINER_OPTION_TYPES: dict[str, Any] = {
    **{f"limit_{stage}_batches": int | float | None for stage in ("train", "val", "test", "predict")},
    "overfit_batches": int | float,
    "val_check_interval": int | float | str | timedelta | dict[str, int] | None,
}
_LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
"""Commands of Lightning, which does not accept ``none`` as checkpoint."""
_METRIC_COMMANDS = ("validate", "test")
"""Commands that print a table of the metrics."""
_INFERENCE_COMMANDS = ("validate", "test", "predict", "generate")
"""Commands that use weights without training them."""
SUBCOMMANDS = ("fit", "validate", "test", "predict", "generate", "export", "replay")


class MoslimCLI(OpenCLI):
    """Command line of MOSLIM; see ``python main.py fit --help``. Later files and options override earlier ones.

    ``preferences`` and ``seed_everything`` are linked to the arguments ``preferences`` and ``seed`` of model and data
    module. A run is written to ``<trainer.default_root_dir>/version_N``.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        install()
        layered()
        self._arguments = sys.argv[1:] if args is None else args
        strict = {"allow_abbrev": False}
        usage = f"{Path(sys.argv[0]).name} {{}} [--config FILE] [options]"
        super().__init__(
            LightningModule,
            PreferenceDataModule,
            trainer_class=MoslimTrainer,
            trainer_defaults={
                "use_distributed_sampler": False,
                "default_root_dir": "outputs",
                "enable_model_summary": False,
            },
            # Abbreviated options would hide misspelt ones, and Lightning's full usage has 60 lines.
            parser_class=MoslimParser,
            parser_kwargs=strict | {name: strict | {"usage": usage.format(name)} for name in SUBCOMMANDS},
            save_config_kwargs={"overwrite": True},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands, with the arguments that are not options of each."""
        skipped_arguments = {"model", "datamodule"}
        own_commands = dict.fromkeys(("generate", "export", "replay"), skipped_arguments)
        return {**LightningCLI.subcommands(), **own_commands}

    def may_run(self, subcommand: str) -> bool:
        """Whether the options of a subcommand are needed; adding those of all subcommands takes 0.3 seconds."""
        return self._arguments[:1] == [subcommand] or not set(self._arguments[:1]) & set(SUBCOMMANDS)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the option ``seed_everything``."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of the run and of all its parts.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds preferences and default callbacks, and links preferences and seed to model and data module."""
        parser.add_argument("--preferences", type=PreferenceSet, sub_configs=True, help="The dimensions in use.")
        _keep_whole_numbers(parser)
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_lightning_class_args(ThroughputMonitor, "throughput")
        parser.add_lightning_class_args(RoleMemory, "role_memory")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        # Linked when parsing, not when instantiating, so that hyper-parameters in a checkpoint are plain data.
        for part in ("model", "data"):
            parser.link_arguments("preferences", f"{part}.init_args.preferences")
            parser.link_arguments("seed_everything", f"{part}.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments, and keeps the config."""
        self.config = parser.parse_args(cast("list[str] | None", args))

    def before_instantiate_classes(self) -> None:
        """Validates the config, and warns of options that are dropped.

        Raises:
            UsageError: An option is invalid, or a default cannot be written to ``config.yaml``.
        """
        self._refuse_early()
        self.fill_config_dump()
        for message in dropped([str(file) for file in self.option(self.config, "config") or []], self.config_dump):
            rank_zero_warn(message)
        for key, value in _leaves(self.config_dump):
            if isinstance(value, str) and value.startswith("Unable to serialize instance"):
                raise UsageError(
                    f"the default of `{key}` cannot be written to config.yaml, so the run could not be repeated; "
                    f"give its arguments by keyword, or use None and choose in the code ({value})"
                )

    def _refuse_early(self) -> None:
        """Validates options before a model is loaded.

        Raises:
            UsageError: A level or dimension is unknown, or a command without ``ckpt_path`` would use untrained weights.
        """
        if self.subcommand == "generate" and (levels := self.option(self.config, "levels", default=None)):
            preferences = self.option(self.config, "preferences", default=None)
            if preferences is not None:
                PreferenceSet(**preferences.init_args.as_dict()).requested(levels)
        ckpt_path, model = self.option(self.config, "ckpt_path"), self.option(self.config, "model")
        if self.subcommand in _INFERENCE_COMMANDS and ckpt_path is None and model is not None:
            module, _, name = model.class_path.rpartition(".")
            module_class = getattr(importlib.import_module(module), name)
            if not issubclass(module_class, RunModule):
                if self.subcommand != "generate":  # which checks the module later
                    rank_zero_warn(f"no --ckpt_path: {self.subcommand} takes the weights that {name} starts with")
            elif module_class.starts_untrained(model.get("init_args", {})):
                raise UsageError(untrained(self.subcommand))

    def run_subcommand(self, subcommand: str) -> None:
        """Runs the command and prints its metrics; removes the folders of a run that failed before its first step."""
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, CSVLogger)]
        folders = NewFolders([logger.log_dir for logger in loggers] or [self.trainer.default_root_dir])
        first_step = self.trainer.global_step
        try:
            super().run_subcommand(subcommand)
        except BaseException:
            if self.trainer.is_global_zero and self.trainer.global_step == first_step:
                folders.remove()
            raise
        if subcommand not in _METRIC_COMMANDS or not self._verbose or not self.trainer.is_global_zero:
            return
        has_report = subcommand == "test" and getattr(self.model, "reports_test", False)
        metrics = self.trainer.callback_metrics
        if metrics and not has_report:
            print(metrics_table(f"{subcommand}: metrics", metrics))

    def instantiate_classes(self) -> None:
        """Builds model, data module and trainer.

        Raises:
            UsageError: An option is invalid. Errors of constructors are raised as they are.
        """
        constructor_errors: list[Exception] = []

        def build(cls: type, /, *args: Any, **kwargs: Any) -> Any:
            try:
                return cls(*args, **kwargs)
            except Exception as error:
                constructor_errors.append(error)
                raise

        self.parser.add_instantiator(build, object, subclasses=True)
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate against any of"):
                raise
            cause: BaseException = error  # for models and data modules, which Lightning builds
            while cause.__cause__ is not None and str(cause).startswith("Does not validate against any of"):
                cause = cause.__cause__
            # The parser hides errors of constructors among those of the other types of an option.
            for candidate in (*constructor_errors, cause):
                if candidate in constructor_errors or isinstance(candidate, UsageError) or in_own_code(candidate):
                    raise candidate from candidate.__cause__
            raise UsageError(shortened(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer with a CSV logger first."""
        config = self.option(self.config_init, "trainer")
        return super().instantiate_trainer(logger=_csv_first(config.logger, config.default_root_dir), **kwargs)

    def build_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Builds the trainer, without checkpoint callbacks if checkpoints are disabled.

        Raises:
            UsageError: Lightning refuses an option.
        """
        if config["enable_checkpointing"] is False or config["fast_dev_run"]:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        try:
            return super().build_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            if in_own_code(error) or isinstance(error, UsageError):
                raise
            raise UsageError(f"trainer: {error}") from error

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        """Returns the arguments of the Trainer's method; resolves ``ckpt_path`` and continues the W&B run.

        Raises:
            UsageError: ``ckpt_path`` is empty, or names a checkpoint that does not exist.
        """
        kwargs = super().subcommand_arguments(subcommand)
        if kwargs["ckpt_path"] == "":
            raise UsageError("--ckpt_path is empty: give last, best, a file, or none")
        if subcommand in _LIGHTNING_COMMANDS and not given(kwargs["ckpt_path"]):
            kwargs["ckpt_path"] = None
        if kwargs["ckpt_path"] in ("last", "best"):
            kwargs["ckpt_path"] = str(
                self._resolved_checkpoint(subcommand, kwargs["ckpt_path"], kwargs["weights_only"])
            )
        if subcommand == "fit" and kwargs["ckpt_path"] is not None:
            continue_run(self.trainer.loggers, Path(kwargs["ckpt_path"]))
        if kwargs["weights_only"] is None:
            kwargs["weights_only"] = True
        if subcommand in _METRIC_COMMANDS:  # Lightning's table cuts names and shows 16 digits
            self._verbose, kwargs["verbose"] = kwargs["verbose"], False
        if subcommand == "predict" and kwargs["return_predictions"] is None:
            kwargs["return_predictions"] = False  # they are saved to a file
        return kwargs

    def _resolved_checkpoint(self, subcommand: str, name: str, weights_only: bool | None) -> Path:
        """Finds the checkpoint ``last`` or ``best`` in the folders of loggers and checkpoint callbacks."""
        log_folders = [Path(logger.log_dir) for logger in self.trainer.loggers if isinstance(logger, CSVLogger)]
        parents = (folder.parent for folder in log_folders)
        roots = dict.fromkeys([*parents, *log_folders, Path(self.trainer.default_root_dir)])
        savers = (callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))
        folders = [str(saver.dirpath) for saver in savers if saver.dirpath]
        for folder in folders or [str(self.trainer.default_root_dir)]:
            if is_remote(folder):
                raise UsageError(
                    f"--ckpt_path {name} looks on this machine only, not in {folder}: name the URL of a file"
                )
        resume = subcommand == "fit" and name == "last"
        newest = newest_checkpoint(roots, folders, weights_only is not False, resume, name)
        return newest if name == "last" else best_checkpoint_of(newest)


def _csv_first(logger: Logger | list[Logger] | bool | None, root: str) -> list[Logger] | bool:
    """Puts a CSV logger first, which sets the run's folder; ``False`` means no logger."""
    if logger is False:
        return False
    loggers = logger if isinstance(logger, list) else [logger] if isinstance(logger, Logger) else []
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        _never_prompt_for_wandb()
    csv_loggers: list[Logger] = [logger for logger in loggers if isinstance(logger, CSVLogger)]
    other_loggers = [logger for logger in loggers if not isinstance(logger, CSVLogger)]
    return [*(csv_loggers or [CSVLogger(root, name="")]), *other_loggers]


def _keep_whole_numbers(parser: LightningArgumentParser) -> None:
    """Makes ``--trainer.limit_train_batches 1`` mean one batch, not 1.0 = all.

    The parser tries the types of a union in order. ``typing`` caches ``Union[int, float]`` as an earlier
    ``Union[float, int]``; ``int | float`` keeps its order.
    """
    for name, option_type in _TRAINER_OPTION_TYPES.items():
        set_option_type(parser, f"trainer.{name}", option_type)


def _leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and the value of every entry of nested dicts."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, config


def _never_prompt_for_wandb() -> None:
    """Sets W&B offline if there is no key, since it would prompt for one; ``WANDB_MODE`` takes precedence."""
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    if "WANDB_API_KEY" not in os.environ and not any("wandb" in host for host in hosts):
        os.environ.setdefault("WANDB_MODE", "offline")


def _with_shipped_paths(arguments: list[str]) -> list[str]:
    """Replaces names of shipped configs by paths, as in ``--config configs:quickstart/policy.yaml``.

    Raises:
        UsageError: A config does not exist.
    """
    with_paths = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        path = located(value)
        if is_shipped(path):  # not found
            raise UsageError(missing(path, None))
        with_paths.append(f"{option}{equals}{path}")
    return with_paths


def run(args: list[str] | None = None) -> MoslimCLI:
    """Runs one command and returns its parts (``model``, ``datamodule``, ``trainer``).

    Args:
        args: Arguments; None = those of the process. The user's own classes may be in the current folder, see
            :func:`~moslim.training.trust.imports_from_here`.
    """
    arguments = _with_shipped_paths(sys.argv[1:] if args is None else args)
    check_configs(arguments)
    refuse_dangerous_names()
    if os.getcwd() not in sys.path and imports_from_here(arguments):
        sys.path.append(os.getcwd())  # last, so that no file there shadows a library
    if not debugging():
        hide_library_messages()
    return MoslimCLI(with_defaults(arguments))


def main(args: list[str] | None = None) -> None:
    """Entry point of ``main.py`` and of the console script; ``--debug`` anywhere shows tracebacks.

    Args:
        args: Arguments; None = those of the process.

    Raises:
        SystemExit: Status 2 after a user's mistake, 1 after a failed run, 130 or 143 after an interruption.
    """
    arguments = without_flag(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        print(importlib.metadata.version("moslim"))
        return
    if not debugging():
        one_line_warnings()
    with reported():
        options = {argument.partition("=")[0] for argument in arguments}
        if arguments[:1] == ["generate"] and "--policy" in options:
            if "--config" in options:
                raise UsageError("generate --policy FOLDER takes no --config: all that it needs is in the folder")
            hide_library_messages()
            auto_cli(generate, args=arguments[1:], as_positional=False, parser_class=MoslimParser)
        else:
            run(arguments)
