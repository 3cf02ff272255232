"""Training, validation and calibration of the reward classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moslim.data.prompts import pad_id
from moslim.data.types import PairBatch
from moslim.data.views import BatchView, RewardView
from moslim.evaluation.best_of import BestOf
from moslim.evaluation.classifier_records import HeldOut
from moslim.ops.loading import freeze_unread, unwrapped
from moslim.ops.lora import LoraOptions, add_lora
from moslim.ops.models import checkpoint_activations
from moslim.ops.numerics import at_least_float32, derive_seed
from moslim.preferences import PreferenceSet
from moslim.reward.backbone import (
    HeadOptions,
    cached_features,
    frozen_temperatures,
    resolve_freeze,
    start_name,
    starting_classifier,
)
from moslim.reward.classifier_card import Record, saved_record, training_record
from moslim.reward.classifier_export import local_folder
from moslim.reward.heads import calibrate
from moslim.reward.losses import BradleyTerry, LevelLoss, LossCounts, credit
from moslim.reward.modeling import Pooling, checked_temperatures
from moslim.reward.testing import ClassifierEvaluation
from moslim.training.checkpointing import drop_frozen, keep_plain_hparams, restore_frozen
from moslim.training.distributed import averaged, fill, is_sharded, outline, shard, shard_mesh
from moslim.training.identity import Entries
from moslim.training.lightning_compat import keep_epoch_open
from moslim.training.optim import configure
from moslim.utils.errors import UsageError
from moslim.utils.files import due
from moslim.utils.folders import refuse_sources

_TEMPERATURES = "temperatures"
_RECORD = "training_record"
_PAIR_LENGTH = "pair_length"


class RewardClassifier(ClassifierEvaluation):
    """Trains a :class:`PreferenceClassifier` and saves it in Hugging Face format at the end of ``fit``.

    One of ``backbone``, ``classifier`` and ``extend`` gives the model to start from.

    Args:
        preferences: The dimensions; each gets a head.

        Model:
        backbone: Hub name or local folder of any ``AutoModel``, with its tokenizer; it gets new heads. An adapter
            (LoRA) is merged into its base model.
        classifier: Hub name or folder of a saved classifier to score with or train further. Its heads, link, pooling,
            layer and length are used.
        extend: Hub name or folder of a saved classifier that gets a head for each new dimension in ``preferences``.
            Its backbone, heads and temperatures do not change. Its own dimensions are evaluated if ``preferences``
            names them too.
        base: Folder or Hub name of the base model, if the run starts from an adapter; None = the one that the adapter
            names.
        trust_remote_code: Whether code from the backbone's repository may run.
        freeze_backbone: Train the heads only, on pooled hidden states that the backbone computes once per row and
            ``cache`` stores. None = true with ``extend``, else false.
        cache: Folder of the stored hidden states; None = ``features`` in ``trainer.default_root_dir``.
        cache_features: Whether to store the hidden states of a frozen backbone; if false, the backbone runs on every
            batch.
        pooling: Input of the heads: the hidden state of the ``last`` or ``first`` token, or the ``mean`` or ``max``
            over all tokens; a list concatenates several, which helps heads on a frozen backbone. ``mean`` and ``max``
            learn to detect and count features of the text with far less training. None = ``last`` for decoders,
            ``mean`` for encoders.
        layer: Backbone layer whose hidden states the heads read, counted from 1; None = the last. On a frozen
            backbone, heads often learn more from a middle layer.
        head_hidden: Width of each head's hidden layer; None = linear heads.
        head_dropout: Dropout on the hidden layers.
        lora: Options of low-rank adapters, which are trained with the heads; None = train all weights.
        max_length: Maximum number of tokens of a pair when the saved classifier scores texts; None = the data module's
            limit in training.

        Loss:
        loss: Loss on rows with levels; None = :class:`Corn`, which has the best probabilities in docs/benchmarks.md.
            The paper's loss is :class:`CrossEntropy`.
        pairs: Loss on rows with a rejected completion, added to ``loss``; None = :class:`BradleyTerry`.

        Optimisation:
        optimizer: Function from parameters to an optimizer; None = AdamW with learning rate 1e-5, 1e-4 with LoRA, or
            1e-3 with a frozen backbone.
        lr_scheduler: Function from an optimizer to a learning rate scheduler, which steps every optimizer step; None =
            a constant rate.
        gradient_checkpointing: Save memory by recomputing activations in the backward pass.
        accept_changes: Options in which a checkpoint or saved classifier may differ from this run
            (:mod:`moslim.training.identity`); the error about a difference names them.
        seed: Seed of dropout, which depends on the seed and the step only.

        Calibration:
        calibrate: Fit one temperature per head on the validation rows, and save them with the classifier.

        Evaluation:
        pair_weights: Weight of each dimension in the sum of expected levels by which the test compares completions;
            None = 1 each.
        best_of: Best-of-n evaluation that the test also runs; None = none.
        report: Folder for a second copy of the test report; the first is in the run's folder.

        Output:
        output: Folder for the trained classifier; None = ``classifier`` in the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
    """

    batch_view: BatchView = RewardView()

    def __init__(
        self,
        preferences: PreferenceSet,
        backbone: str | None = None,
        classifier: str | None = None,
        extend: str | None = None,
        freeze_backbone: bool | None = None,
        cache: str | None = None,
        cache_features: bool = True,
        loss: LevelLoss | None = None,
        pairs: BradleyTerry | None = None,
        pooling: Pooling | list[Pooling] | None = None,
        layer: int | None = None,
        head_hidden: int | None = None,
        head_dropout: float = 0.0,
        calibrate: bool = True,
        lora: LoraOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        pair_weights: dict[str, float] | None = None,
        best_of: BestOf | None = None,
        report: str | None = None,
        output: str | None = None,
        predictions: str | None = None,
        max_length: int | None = None,
        gradient_checkpointing: bool = False,
        base: str | None = None,
        trust_remote_code: bool = False,
        accept_changes: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(preferences, pair_weights)
        self.save_hyperparameters()
        keep_plain_hparams(self)
        self.start = start_name(backbone, classifier, extend)
        self.starts_trained = classifier is not None
        self.freeze_backbone = resolve_freeze(freeze_backbone, extend is not None, lora is not None)
        self.cache = cache
        self.cache_features = cache_features
        self.pairs = pairs or BradleyTerry()
        self.calibrate = calibrate
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.best_of = best_of
        self.report = report
        self.output = output
        self.predictions = predictions
        self.adapter_base = base
        self.trust_remote_code = trust_remote_code
        self.accept_changes = accept_changes or []
        self.max_length = max_length
        self.extends = extend is not None
        self.seed = seed
        option: Literal["backbone", "classifier", "extend"]
        option = "extend" if self.extends else "classifier" if self.starts_trained else "backbone"
        heads = HeadOptions(pooling, layer, head_hidden, head_dropout)
        model, self.loss = starting_classifier(
            self.start, option, preferences, loss, heads, max_length, base, trust_remote_code
        )
        self._before = {} if backbone is not None else saved_record(local_folder(self.start))
        self._record = self._before
        torch.nn.Module.to(model, at_least_float32(model.dtype))  # 16-bit weights lose small updates
        freeze_unread(model.backbone)
        model.train()  # models are loaded in evaluation mode
        if self.freeze_backbone:
            model.backbone.requires_grad_(False).eval()
        self._columns = preferences.columns_in(model.preferences, "classifier")
        self._kept_temperatures = frozen_temperatures(model)
        self._added = [] if extend is None else [d for d in preferences.names if d not in self._kept_temperatures]
        if gradient_checkpointing:
            checkpoint_activations(model)
        self.classifier: Any = add_lora(model, lora, trained_whole=["head", "added"]) if lora else model
        if classifier is not None:
            self._as_saved = self._as_it_is()
            model.config.pair_length = max_length or model.config.pair_length
        self._held_out = HeldOut()
        self._calibrated_at = 0
        self._validated = False
        self._calibration: dict[str, Tensor] = {}
        # Function from a sharded classifier to a whole one, which must not be a submodule of this module.
        self._collect: Callable[[Any], Any]

    def configure_model(self) -> None:
        """Shards the weights if the strategy shards models.

        Raises:
            UsageError: The backbone is frozen, or ``best_of`` is set: processes would score different numbers of
                completions and deadlock.
        """
        mesh = shard_mesh(self)
        if mesh is None or is_sharded(self.classifier):
            return
        if self.freeze_backbone:
            raise UsageError("model.freeze_backbone is true, so only heads are trained: set trainer.strategy to ddp")
        if self.best_of is not None:
            raise UsageError("model.best_of does not work with sharded weights: set trainer.strategy to ddp")
        self._collect = partial(fill, outline(self.classifier))
        shard(unwrapped(self.classifier), mesh)
        self.strict_loading = all(p.requires_grad for p in self.parameters())  # no checkpoint holds frozen weights

    def setup(self, stage: str) -> None:
        """Stores the data module's length limit in the configuration before training.

        Raises:
            UsageError: The data module's ``max_length`` differs from this module's or from that of the old heads.
        """
        if stage != "fit":
            return
        given: int | None = getattr(self.data, "max_length", None)
        if None not in (given, self.max_length) and self.max_length != given:
            raise UsageError(
                f"model.max_length is {self.max_length}, data.max_length {given}: the classifier would score pairs of "
                "another length than it was trained on: leave model.max_length out"
            )
        if self.extends and given not in (None, self.pair_limit):
            raise UsageError(
                f"data.max_length is {given}, but the old heads were trained with {self.pair_limit}, which the new "
                "heads share: leave it out"
            )
        if given is not None:
            unwrapped(self.classifier).config.pair_length = given
        if self.starts_trained:
            self._as_saved = self._as_it_is()

    def resumed_with(self) -> Entries:
        """See the base class."""
        return {"model.freeze_backbone": self.freeze_backbone, "model.seed": self.seed, **super().resumed_with()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        rate = 1e-3 if self.freeze_backbone else 1e-4 if self.lora else 1e-5
        return configure(self, self.optimizer, self.lr_scheduler, self.parameters(), rate)

    def on_fit_start(self) -> None:
        """Raises a UsageError if ``output`` is a model that the run is built on."""
        if self.output is not None:
            refuse_sources(self.output, self.sources)

    def on_train_start(self) -> None:
        """Resets the temperatures of the heads that this run trains.

        A resumed run that calibrates keeps the temperatures of its last validation.
        """
        super().on_train_start()
        config = unwrapped(self.classifier).config
        before = config.temperatures
        if before is None or (self.calibrate and self.global_step > 0):
            return
        self._set_temperatures({})
        if not self.calibrate and config.temperatures != before:
            trained = [n for n in unwrapped(self.classifier).preferences.names if n not in self._kept_temperatures]
            rank_zero_warn(
                f"model.calibrate is false: the temperatures of {', '.join(trained)} were fitted to the weights before "
                "this training and are reset to 1; set model.calibrate to true to fit new ones"
            )

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seeds dropout by the step, so that a resumed run equals an uninterrupted one."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """See Lightning."""
        scores = self._scores(batch)
        step_counts = self.step_counts(
            self.trainer, batch, batch_idx, lambda part: self._loss_counts(part, scores.dtype).stacked()
        )
        counts = LossCounts.from_stacked(step_counts)
        total, head_losses = self.loss(scores, batch.targets, self.preferences.sizes, counts.labels)
        logs = due(self.trainer)
        metrics: dict[str, Tensor] = {}
        if logs:
            names = zip(self.preferences.names, head_losses, counts.labels.tolist(), strict=True)
            metrics = {f"train/{name}/loss": head for name, head, count in names if count}
            if counts.comparisons > 0:  # all processes must log the same metrics, also one without comparisons
                metrics["train/pairs/loss"] = metrics["train/pairs/accuracy"] = total.new_zeros(())
        if len(batch.rejected):
            score_margins = self._score_margins(scores, batch)
            comparison_loss = self.pairs(score_margins, batch.comparison_mask, batch.margins, counts.comparisons)
            total = total + self.pairs.weight * comparison_loss
            if logs and counts.comparisons > 0:
                metrics["train/pairs/loss"] = comparison_loss.detach()
                right = (credit(score_margins) * batch.comparison_mask).sum()
                metrics["train/pairs/accuracy"] = right / counts.comparison_cells
        if logs:
            self.record_part(averaged({"train/loss": total.detach(), **metrics}), batch_idx)
        if batch.features is None:
            size = batch.attention_mask.numel()
            padding = 1 - batch.attention_mask.sum() / size
            self.log("train/padding", padding, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return total

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """See Lightning."""
        scores = self._evaluate(batch)
        if self._calibrates:
            self._hold_out(scores, batch)

    def on_validation_epoch_start(self) -> None:
        """Resets the metrics, which an interrupted validation may have updated."""
        self._losses.reset()
        self._metrics.reset()
        self._pair_metrics.reset()
        self._held_out.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics and, in ``fit``, calibrates.

        The metrics are ``val/{dimension}/{measure}``, ``val/mean/{measure}`` and the same under ``val/{subset}/``;
        ``val/pairs/accuracy`` if rows have rejected completions; and after calibration
        ``val/calibration/{dimension}/{ece, classwise_ece, brier, rps}/{before, after}``.
        """
        self._log_loss("val")
        self._report("val")
        self._validated = not self.trainer.sanity_checking
        if self._calibrates:
            self.log_dict(self._calibrate())

    def on_train_end(self) -> None:
        """Calibrates the final weights, unless the last validation did, and saves ``last.ckpt`` again."""
        if not self._calibrates or self._calibrated_at == self.global_step:
            return
        if not self.trainer.val_dataloaders:
            self._set_temperatures({})  # a checkpoint's were fitted to other weights
            rank_zero_warn("the classifier is saved without calibration, which needs a validation split: give one")
            return
        self._held_out.reset()
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in islice(self.trainer.val_dataloaders, int(self.trainer.num_val_batches[0])):
                moved = self.trainer.strategy.batch_to_device(batch)
                self._hold_out(self._scores(moved), moved)
        self.train()
        measures = {key: value.item() for key, value in self._calibrate().items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(measures, self.global_step)
        for callback in self.trainer.checkpoint_callbacks:  # these have saved before this hook
            if callback.last_model_path:  # type: ignore[attr-defined]
                self.trainer.save_checkpoint(callback.last_model_path)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but a frozen backbone, which remains in evaluation mode: its features are constant."""
        super().train(mode)
        if self.freeze_backbone:
            self.classifier.backbone.eval()
        return self

    @property
    def row_features(self) -> Callable[[list[list[int]]], Tensor] | None:
        """Function from token ids of all rows to cached features; None if each batch runs the backbone."""
        fast_dev_run = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set dynamically
        if not self.freeze_backbone or fast_dev_run or not self.cache_features:
            return None
        folder = Path(self.cache or Path(self.trainer.default_root_dir) / "features")
        return partial(cached_features, self.classifier, pad_id(self.tokenizer), folder, self.trainer)

    def on_fit_end(self) -> None:
        """Saves the classifier if it was trained."""
        folder = self.output_folder
        if not self.was_trained:
            return
        sharded = self.classifier
        if is_sharded(sharded):
            self.classifier = self._collect(sharded)
        if self.trainer.is_global_zero:
            self._record = self._training_record()
            self.export(folder)
            rank_zero_info(f"the classifier is in {folder}")
        self.classifier = sharded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes frozen weights, and adds the temperatures, the length limit and the training record."""
        checkpoint[_TEMPERATURES] = self.classifier.config.temperatures
        if self.was_trained:
            self._record = self._training_record()
        checkpoint[_RECORD] = self._record
        checkpoint[_PAIR_LENGTH] = unwrapped(self.classifier).config.pair_length
        self.keep_identity(checkpoint)
        drop_frozen(self, checkpoint)
        keep_epoch_open(self.trainer, checkpoint)

    def _training_record(self) -> Record:
        """The run's record; for a finished run that is resumed without validation, the one in its checkpoint."""
        if self._record.get("steps") == self.global_step and not self._validated:
            return self._record
        return training_record(self.trainer, self.preferences, self._calibration, self._before, self._added)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores temperatures, length limit and training record, and adds the frozen weights.

        Raises:
            UsageError: The checkpoint was saved with other options or rows, see :mod:`moslim.training.identity`.
        """
        changed = self.check_identity(checkpoint)
        config = unwrapped(self.classifier).config
        if "data.max_length" not in changed:
            config.pair_length = checkpoint.get(_PAIR_LENGTH, config.pair_length)
        else:  # the change was accepted: evaluation and export use the new length
            config.pair_length = getattr(self.data, "max_length", None) or config.pair_length
        config.temperatures = checked_temperatures(checkpoint.get(_TEMPERATURES), len(config.dimensions))
        self._record = checkpoint.get(_RECORD, {})
        restore_frozen(self, checkpoint)

    @property
    def _calibrates(self) -> bool:
        """Whether validation calibrates: in ``fit``, after the first optimizer step."""
        fits = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        return self.calibrate and fits and self.was_trained

    def _hold_out(self, scores: Tensor, batch: PairBatch) -> None:
        self._held_out.update(self._logits(scores), batch.targets, [row.group or row.question for row in batch.rows])

    def _set_temperatures(self, fitted: dict[str, float]) -> None:
        """Sets temperatures by dimension, 1 for a missing one; heads that are not trained keep theirs."""
        temperatures = fitted | self._kept_temperatures
        names = unwrapped(self.classifier).preferences.names
        self.classifier.config.temperatures = [temperatures.get(n, 1.0) for n in names] if temperatures else None

    def _calibrate(self) -> dict[str, Tensor]:
        """Fits and sets the temperatures, and returns the calibration metrics to log."""
        calibration = calibrate(*self._held_out.compute(), self.preferences)
        self._set_temperatures(dict(zip(self.preferences.names, calibration.temperatures, strict=True)))
        self._calibrated_at = self.global_step
        self._calibration = {f"val/calibration/{key}": value for key, value in calibration.measures.items()}
        return self._calibration
