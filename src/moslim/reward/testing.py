"""Test, prediction and export of a classifier, independent of its training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.batches import unrounded
from moslim.data.chat_templates import tokenizer_pins
from moslim.data.types import Example, PairBatch
from moslim.data.views import ServedModule
from moslim.evaluation.best_of import BestOf, Candidates
from moslim.evaluation.classifier_measures import complete_weights
from moslim.evaluation.classifier_records import LossMean, ScoreCollector, SubsetMetrics
from moslim.evaluation.classifier_report import evaluate, find_result, publish, scalars
from moslim.ops.adapters import adapter_base
from moslim.ops.length_bucketing import like_length, pass_tokens
from moslim.ops.loading import unwrapped
from moslim.ops.lora import adapter_scales, is_adapted, merged
from moslim.ops.models import Positions, fit_tokenizer, load_tokenizer
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_card import ModelCard, save_record
from moslim.reward.classifier_export import Form, is_classifier, save_adapter, save_merged
from moslim.reward.heads import LINKS
from moslim.reward.losses import BradleyTerry, LevelLoss, LossCounts, PairMetrics, num_comparisons
from moslim.reward.modeling import PreferenceClassifierOutput
from moslim.reward.scorer import Scorer, carried, pair_limit, prediction_rows
from moslim.training.base_module import RunModule
from moslim.training.checkpointing import fingerprint
from moslim.training.distributed import is_sharded
from moslim.training.identity import Entries, architecture, check_identity, keep_identity
from moslim.training.lightning_compat import attached_trainer
from moslim.utils.errors import UsageError
from moslim.utils.folders import refuse_sources, whole_folder


class HeadOutput(NamedTuple):
    """Output of the heads whose dimensions a run names.

    Args:
        logits: ``[B, D, K]``, with the temperatures in use; ``-inf`` on levels that a dimension lacks.
        scores: ``[B, D, S]``, the heads' raw outputs.
    """

    logits: Tensor
    scores: Tensor


class ClassifierEvaluation(RunModule, ServedModule):
    """The test and use of a classifier. :class:`RewardClassifier` sets the attributes and adds training.

    Args:
        preferences: The dimensions that are evaluated.
        pair_weights: Weight by dimension of the expected levels whose sum the test compares answers by; None = 1 each.
    """

    preferences: PreferenceSet
    start: str
    """Folder or Hub name that the run started from."""
    starts_trained: bool
    """Whether the start is a whole classifier, which can be exported without training."""
    adapter_base: str | None
    """Base model of a backbone that is an adapter; None for the place that it names."""
    classifier: Any
    loss: LevelLoss
    pairs: BradleyTerry
    best_of: BestOf | None
    report: str | None
    reports_test = True
    output: str | None
    trust_remote_code: bool
    _columns: list[int]
    """Indices of the dimensions of ``preferences`` in the classifier."""

    def __init__(self, preferences: PreferenceSet, pair_weights: dict[str, float] | None) -> None:
        super().__init__()
        self.preferences = preferences
        self.pair_weights = complete_weights(preferences, pair_weights)
        self._losses = LossMean(len(preferences) + 1)
        self._metrics = SubsetMetrics(preferences)
        self._pair_metrics = PairMetrics(preferences)
        self._as_saved: Entries = {}
        self._tested = ScoreCollector(preferences)
        self._choices: list[Candidates] = []
        self._record: dict[str, Any] = {}  # what the model card says of the training

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of what the run started from."""
        tokenizer = load_tokenizer(self.start, self.trust_remote_code, self.adapter_base)
        return fit_tokenizer(tokenizer, unwrapped(self.classifier).backbone, self.start)

    @property
    def sources(self) -> dict[str, str | None]:
        """Models that the run is built on, which no export may replace."""
        return {"the start": self.start, "model.base": self.adapter_base or adapter_base(self.start)}

    @property
    def pair_limit(self) -> int | None:
        """Most tokens of a pair to be scored, where the data module sets no limit."""
        model = unwrapped(self.classifier)
        return pair_limit(model.config, self.tokenizer, model.backbone)

    def longest(self, wanted: int | None) -> int | None:
        """Most tokens of a pair, given the data module's limit; a pair that cannot be read is refused."""
        return Positions.of(unwrapped(self.classifier).backbone).longest(wanted, self.start)

    @property
    def output_folder(self) -> Path:
        """Folder of the saved classifier. All processes must read this property."""
        return Path(self.output) if self.output else self.run_folder / "classifier"

    # Heads of one width would change places; parameters would not fit.
    never_accepted = ("preferences", "model.freeze_backbone")

    def meaning(self) -> Entries:
        """Options that give the classifier's weights their meaning."""
        config = unwrapped(self.classifier).config
        return {
            "preferences": config.dimensions,
            "model.pooling": config.pooling,
            "model.layer": config.layer,
            "model.loss (link)": config.link,
            "model.head_hidden": config.head_hidden,
            "model.extend": [[head["dimension"], head["hidden"]] for head in config.added_heads],
            "model.lora": adapter_scales(self.classifier),
            "model.backbone": architecture(config.backbone),
            **super().meaning(),
        }

    def on_validation_start(self) -> None:
        """Compares a saved classifier that is used as it is with what the data module makes of texts.

        Not in ``setup``: only now it is known whether a checkpoint was loaded, which has a record of its own.

        Raises:
            UsageError: Texts are cut to another length, or written into another chat template.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits or not self.starts_trained or self.trainer.ckpt_path or self.data is None:
            return
        checkpoint: dict[str, Any] = {}
        keep_identity(checkpoint, self._as_saved, {})
        now = self.meaning()
        present = {name: now[name] for name in self._as_saved}
        accepted = [name for name in self.accept_changes if name in present]  # others are about checkpoints
        check_identity(checkpoint, present, {}, accepted, source=f"the classifier in '{self.start}'")

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """See the base class; compared before an earlier file is touched."""
        self.on_validation_start()
        super().on_predict_start()

    def _as_it_is(self) -> Entries:
        """Entries compared where a saved classifier is used as it is; a date only where it was saved with one."""
        pins = tokenizer_pins(self.tokenizer)[0]
        day = {} if pins.day is None else {"data.template_date": pins.day}
        return {"data.max_length": self.pair_limit, "data.template_args": pins.arguments, **day}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, D, K]`` of pairs ``[B, T]``, of all heads; ``-inf`` on levels that a dimension lacks."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gives labels the precision back that ``bf16-true`` and ``16-true`` take from all inputs."""
        return unrounded(batch, self.preferences) if isinstance(batch, PairBatch) else batch

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """See Lightning."""
        output = self._output(batch)
        self._add_loss(output.scores, batch)
        self._tested.add(batch, output.logits.softmax(-1), self._logits(output.scores).softmax(-1))

    def on_test_epoch_start(self) -> None:
        """Forgets what an interrupted test collected, and reads the file of ``best_of`` before anything is scored.

        Raises:
            MissingFileError: There is no such file.
            UsageError: A line of it cannot be used.
        """
        if not (self.starts_trained or self.was_trained or self.trainer.ckpt_path):
            rank_zero_warn("the heads that are tested were never trained: give --ckpt_path last, or a file")
        self._tested.clear()
        self._losses.reset()
        self._choices = self.best_of.choices(self.preferences) if self.best_of else []

    def on_test_epoch_end(self) -> None:
        """Writes the report into the run's folder, and a copy of it where ``report`` says; logs ``test/...``."""
        self._log_loss("test")
        rows, pairs = self._tested.gathered()
        score = self._scorer().probabilities
        best_of = self.best_of(self._choices, score, self.preferences) if self.best_of else None
        result = {"weights": self._weights(), **evaluate(rows, pairs, self.preferences, self.pair_weights, best_of)}
        self.log_dict({f"test/{key}": value for key, value in scalars(result).items()})
        folders = [self.run_folder, *([Path(self.report)] if self.report else [])]
        if self.trainer.is_global_zero:
            publish(self.trainer, result, folders)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Scores a batch; the records are written to the file of ``predictions``."""
        classifier = unwrapped(self.classifier)
        probs = classifier.level_probabilities(self._unpadded(batch).logits)
        return prediction_rows(batch.rows, probs, classifier.preferences)

    @classmethod
    def starts_untrained(cls, options: Mapping[str, Any]) -> bool:
        """See :class:`RunModule`: a saved classifier is trained, a backbone has new heads."""
        return options.get("classifier") is None

    def predictions_depend_on(self, rows: Callable[[], Iterable[Example]]) -> dict[str, Any]:
        """Plain data that the scores of a row depend on, besides the row."""
        config = unwrapped(self.classifier).config.to_dict()
        return {
            "weights": self._weights(),
            "configuration": {key: config[key] for key in ("dimensions", "pooling", "layer", "link", "temperatures")},
            "max_length": getattr(self.trainer.datamodule, "max_length", None) or self.pair_limit,  # type: ignore[attr-defined]
            "chat_template": hashlib.sha256(repr(self.tokenizer.chat_template).encode()).hexdigest(),
            "precision": str(self.trainer.precision),
        }

    def carried(self, row: Example) -> dict[str, Any]:
        """See :class:`RunModule`."""
        return carried(row)

    def export(self, folder: str | Path) -> None:
        """Saves the classifier (adapter merged) in the merged form of :mod:`moslim.reward.classifier_export`.

        Raises:
            UsageError: That folder holds what the run started from, or another model.
        """
        refuse_sources(folder, self.sources)
        with whole_folder(Path(folder), is_classifier) as part:
            save_merged(merged(self.classifier), part)
            self._complete(part, "merged")

    def export_adapter(self, folder: str | Path) -> None:
        """Saves adapter and heads in the adapter form of :mod:`moslim.reward.classifier_export`.

        Raises:
            UsageError: There is no adapter, it changes more than the backbone, or that folder holds what the run
                started from, or another model.
        """
        if not is_adapted(self.classifier):
            raise UsageError("all weights were trained (model.lora is null), so there is no adapter: use --form merged")
        refuse_sources(folder, self.sources)
        with whole_folder(Path(folder), is_classifier) as part:
            save_adapter(self.classifier, self.start, part)
            self._complete(part, "adapter")

    def _complete(self, folder: Path, form: Form) -> None:
        """Adds to an exported classifier what people need to use it."""
        self.tokenizer.save_pretrained(folder)
        config = unwrapped(self.classifier).config
        trainer = attached_trainer(self)  # there may be none
        root = None if trainer is None else trainer.default_root_dir
        tested = find_result([place for place in (root, self.report) if place], self._weights())
        card = ModelCard(config, self.tokenizer, form, self.start, self._record, tested)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        save_record(self._record, folder)

    def _weights(self) -> str:
        return fingerprint(self.classifier.state_dict())

    def _output(self, batch: PairBatch) -> HeadOutput:
        """Output of the heads whose dimensions the run names."""
        if batch.features is not None:
            output = self.classifier.classify(batch.features)
        elif self.training:
            output = self.classifier(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        else:
            output = self._unpadded(batch)
        widest = max(map(LINKS[self.loss.link].width, self.preferences.sizes))
        levels = max(self.preferences.sizes)
        return HeadOutput(output.logits[:, self._columns, :levels], output.scores[:, self._columns, :widest])

    def _unpadded(self, batch: PairBatch) -> PreferenceClassifierOutput:
        """Output for a batch outside training; pairs of similar length share a forward pass."""
        ids, mask = batch.input_ids, batch.attention_mask
        if is_sharded(self.classifier):  # all processes must pass equally often
            return self.classifier(input_ids=ids, attention_mask=mask)
        lengths = mask.sum(1).tolist()
        parts = list(like_length(lengths, pass_tokens(ids.device)))
        forward_config = [
            self.classifier(input_ids=ids[part, : lengths[part[-1]]], attention_mask=mask[part, : lengths[part[-1]]])
            for part in parts
        ]
        place = torch.tensor([row for part in parts for row in part], device=ids.device).argsort()
        logits, scores = (torch.cat([one[key] for one in forward_config])[place] for key in ("logits", "scores"))
        return PreferenceClassifierOutput(logits=logits, scores=scores)

    def _scores(self, batch: PairBatch) -> Tensor:
        """The heads' raw outputs ``[B, D, S]``."""
        return self._output(batch).scores

    def _logits(self, scores: Tensor) -> Tensor:
        """Logits ``[B, D, K]`` at temperature 1, whatever temperatures are in use."""
        return LINKS[self.loss.link].logits(scores, self.preferences.sizes)

    def _add_loss(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """Counts a batch for the loss of the epoch, and returns its score margins ``[P, D]``."""
        counts = self._loss_counts(batch, scores.dtype)
        one = scores.new_ones(())
        _, head_losses = self.loss(scores, batch.targets, self.preferences.sizes, one.expand(len(counts.labels)))
        score_margins = self._score_margins(scores, batch)
        comparison_loss = self.pairs(score_margins, batch.comparison_mask, batch.margins, one)
        sums = torch.cat([head_losses, comparison_loss[None]])
        self._losses.update(sums, torch.cat([counts.labels, counts.comparisons[None].to(counts.labels.dtype)]))
        return score_margins

    def _evaluate(self, batch: PairBatch) -> Tensor:
        """Counts a batch for the metrics, and returns the heads' scores."""
        scores = self._scores(batch)
        score_margins = self._add_loss(scores, batch)
        self._metrics.update(self._logits(scores).argmax(-1), batch.levels, [row.subset for row in batch.rows])
        self._pair_metrics.update(score_margins, batch.comparison_mask)
        return scores

    def _report(self, stage: str) -> None:
        """Logs the metrics of the epoch."""
        metrics = self._metrics.compute(self.device) | self._pair_metrics.compute()
        self.log_dict({f"{stage}/{key}": value for key, value in metrics.items()})

    def _log_loss(self, stage: str) -> None:
        """Logs the loss over all rows of the epoch, in all processes."""
        *head_losses, comparison_loss = self._losses.compute()
        weights = self.loss.weights or [1.0] * len(head_losses)
        labels = torch.stack([weight * head for weight, head in zip(weights, head_losses, strict=True)]).sum()
        self.log(f"{stage}/loss", labels + self.pairs.weight * comparison_loss)
        self._losses.reset()

    def _loss_counts(self, batch: PairBatch, dtype: torch.dtype) -> LossCounts:
        """Denominators of a batch's losses."""
        labels = self.loss.counts(batch.targets.to(dtype), self.preferences.sizes).sum(0)
        return LossCounts(labels, num_comparisons(batch.comparison_mask), batch.comparison_mask.sum())

    def _score_margins(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """Expected level of the chosen completions less that of the rejected, ``[P, D]``."""
        expected = LINKS[self.loss.link].expected(scores, self.preferences.sizes)
        return expected[batch.chosen] - expected[batch.rejected]

    def _scorer(self) -> Scorer:
        """Scores texts with the classifier as it is, and as the data module encodes them."""
        scorer = Scorer(self.classifier, self.tokenizer)
        scorer.reserve(self.instruction_patterns)
        return scorer
