"""Training, evaluation and export of the reward classifier."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moslim.base import RunModule
from moslim.checkpoints import drop_frozen, keep_epoch_open, keep_plain_hparams, restore_frozen
from moslim.data.types import PairBatch, View
from moslim.lora import LoraOptions, add_lora, merged
from moslim.models import checkpoint_activations
from moslim.noise import derive_seed
from moslim.optim import configure
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import Pooling, PreferenceClassifier
from moslim.reward.losses import MISSING, CrossEntropy, LevelLoss
from moslim.reward.metrics import SubsetMetrics
from moslim.reward.predictions import prediction_rows


class RewardClassifier(RunModule):
    """Trains a :class:`PreferenceClassifier`, and saves it in Hugging Face format when ``fit`` ends.

    Args:
        preferences: The dimensions; each gets a head.
        backbone: Hub name or local folder of any ``AutoModel``, with its tokenizer.
        loss: What is minimised; None = :class:`CrossEntropy`.
        pooling: What the heads read: the hidden state of the ``last`` token, or the ``mean`` over tokens, which finds
            and counts things in the text with far less training; None = last for decoders, mean for encoders.
        lora: Train low-rank adapters and the heads; None = train all weights.
        optimizer: From parameters to optimizer; None = AdamW, rate 1e-5, or 1e-4 with LoRA.
        lr_scheduler: From optimizer to schedule, moved every step; None = a constant rate.
        output: Folder for the trained classifier; None = ``classifier`` in the run's folder.
        predictions: File that ``predict`` writes; None = ``predictions.jsonl`` in the run's folder.
        max_length: Most tokens of a pair when the saved classifier scores texts; give the data module the same.
        gradient_checkpointing: Save memory by computing activations twice.
        trust_remote_code: Whether code from the backbone's repository may run.
        seed: Seed of dropout, which is a function of the step and not of what ran before it.
    """

    batch_view = View.REWARD

    def __init__(
        self,
        preferences: PreferenceSet,
        backbone: str,
        loss: LevelLoss | None = None,
        pooling: Pooling | None = None,
        lora: LoraOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        output: str | None = None,
        predictions: str | None = None,
        max_length: int | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        keep_plain_hparams(self)
        self.preferences = preferences
        self.backbone = backbone
        self.loss = loss or CrossEntropy()
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.output = output
        self.predictions = predictions
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        classifier = PreferenceClassifier.from_backbone(
            backbone, preferences, pooling=pooling, max_length=max_length, trust_remote_code=trust_remote_code
        )
        classifier.train()  # a backbone is loaded in evaluation mode, without dropout
        if gradient_checkpointing:
            checkpoint_activations(classifier)
        self.classifier: Any = add_lora(classifier, lora, trained_whole=["head"]) if lora else classifier
        self._metrics = SubsetMetrics(preferences)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return AutoTokenizer.from_pretrained(self.backbone, trust_remote_code=self.trust_remote_code)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See Lightning."""
        rate = 1e-4 if self.lora else 1e-5
        return configure(self, self.optimizer, self.lr_scheduler, self.parameters(), rate)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, D, K]`` of pairs ``[B, T]``; ``-inf`` on levels that a dimension lacks."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Makes dropout a function of the step, so that a resumed run equals an uninterrupted one."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """See Lightning."""
        logits = self(batch.input_ids, batch.attention_mask)
        labelled = (batch.levels != MISSING).sum(0)
        total, heads = self.loss(logits, batch.levels, self.preferences.sizes, self._global_counts(labelled))
        names = zip(self.preferences.names, heads, labelled.tolist(), strict=True)
        parts = {f"train/{name}/loss": head for name, head, count in names if count}
        self.log_dict({"train/loss": total.detach(), **parts}, batch_size=len(batch.rows))
        return total

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """See Lightning."""
        self._evaluate(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """See Lightning."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Forgets what an interrupted validation counted."""
        self._metrics.reset()

    def on_test_epoch_start(self) -> None:
        """As before validation."""
        self._metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/{dimension}/{measure}``, ``val/mean/{measure}`` and the same under ``val/{subset}/``."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """As after validation, under ``test/``."""
        self._report("test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Scores a batch; the records are written to the file of ``predictions``."""
        probs = self(batch.input_ids, batch.attention_mask).softmax(-1)
        return prediction_rows(batch.rows, probs, self.preferences)

    def on_fit_end(self) -> None:
        """Saves the classifier, unless nothing was trained or the run was a dry one."""
        folder = self.output_folder
        if self.trainer.is_global_zero and self.was_trained:
            self.export(folder)

    @property
    def output_folder(self) -> Path:
        """Where the classifier is saved. Under several processes all must ask."""
        return Path(self.output) if self.output else self.run_folder / "classifier"

    def export(self, folder: str | Path) -> None:
        """Saves the classifier (adapters merged) and its tokenizer, for ``Scorer.from_pretrained(folder)``."""
        merged(self.classifier).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trained weights only."""
        drop_frozen(self, checkpoint)
        keep_epoch_open(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Completes the weights from the backbone."""
        restore_frozen(self, checkpoint)

    def _evaluate(self, batch: PairBatch, stage: str) -> None:
        logits = self(batch.input_ids, batch.attention_mask)
        total, _ = self.loss(logits, batch.levels, self.preferences.sizes)
        self.log(f"{stage}/loss", total, on_step=False, on_epoch=True, batch_size=len(batch.rows), sync_dist=True)
        self._metrics.update(logits.argmax(-1), batch.levels, [row.subset for row in batch.rows])

    def _report(self, stage: str) -> None:
        found = self._metrics.compute(self.device)
        self.log_dict({f"{stage}/{key}": value for key, value in found.items()})

    def _global_counts(self, labelled: Tensor) -> Tensor:
        """Labels per head over all processes, as this process's share: gradients are averaged over processes."""
        ranks = self.trainer.world_size
        if ranks == 1:
            return labelled.clamp(min=1)
        labelled = labelled.clone()
        dist.all_reduce(labelled)
        return labelled.clamp(min=1) / ranks
